"""The loss compared with the formulas of the scheduler, and the random inputs of a training step."""

from __future__ import annotations

import pytest
import torch

from utils.model import loading
from utils.model.spec import read_spec
from utils.training.loss import sample_inputs, velocity_loss


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_loss_equals_the_formulas_of_the_scheduler(tiny, variant):
    """Compares with `get_velocity`, and with (1 / (1 - abar)) ||x0_hat - x0||^2 for the x0_hat of the scheduler."""
    scheduler = loading.load_scheduler(tiny(variant))
    alphas_cumprod = scheduler.alphas_cumprod.double()
    x0, noise, predicted = torch.randn(3, 4, 3, 2, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 371, 998, 999])
    inputs = []

    def predict(noisy, timesteps):
        inputs.append(noisy)
        return predicted

    loss = velocity_loss(predict, alphas_cumprod, x0, timesteps, noise)

    velocity = scheduler.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(loss, (predicted - velocity).square().mean((1, 2, 3, 4)), rtol=0, atol=1e-10)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(inputs[0], noisy, rtol=0, atol=1e-10)
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    x0_hat = signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    weighted = ((x0_hat - x0).square() / (1 - signal)).mean((1, 2, 3, 4))
    torch.testing.assert_close(loss, weighted, rtol=0, atol=1e-10)


def test_loss_of_half_precision_predictions_is_float32():
    alphas_cumprod = torch.linspace(0.99, 0.0, 10, dtype=torch.float64)
    x0, noise = torch.randn(2, 1, 2, 2, 4, 4)
    loss = velocity_loss(lambda noisy, t: noisy.bfloat16(), alphas_cumprod, x0, torch.tensor([5]), noise)
    assert loss.dtype == torch.float32


def test_noise_of_a_sample_does_not_depend_on_its_batch(tiny):
    spec = read_spec(tiny("1.5-i2v"))
    video, image = torch.randn(3, 32, 3, 4, 4), torch.randn(3, 4, 32, 1, 4, 4)
    together = sample_inputs(spec, video, image, [7, 8, 9], 1000)
    alone = sample_inputs(spec, video[1:2], image[1:2], [8], 1000)
    assert torch.equal(together.latents[1:2], alone.latents)
    assert torch.equal(together.noise[1:2], alone.noise)
    assert together.image_latents is not None and alone.image_latents is not None
    assert torch.equal(together.image_latents[1:2], alone.image_latents)
    assert together.timesteps[1] == alone.timesteps
    assert not torch.equal(together.noise[0], together.noise[1])


def test_random_inputs_have_the_expected_distributions(tiny):
    spec = read_spec(tiny("5b-i2v"))
    video, image = torch.zeros(400, 32, 1, 4, 4), torch.randn(400, 4, 32, 1, 4, 4)
    inputs = sample_inputs(spec, video, image, list(range(400)), 1000, image_dropout=0.25)
    assert 0 <= inputs.timesteps.min() < 20 and 980 < inputs.timesteps.max() <= 999
    assert abs(inputs.noise.mean()) < 0.02 and abs(inputs.noise.std() - 1) < 0.02
    # moments of mean 0 and log-variance 0: a standard normal, times the scaling factor
    assert abs(inputs.latents.std() / spec.scaling_factor - 1) < 0.02
    assert inputs.image_latents is not None
    dropped = (inputs.image_latents.flatten(1) == 0).all(1).float().mean()
    assert abs(dropped - 0.25) < 0.07
