"""Describes clips with a vision-language model of transformers, which gets some frames of each clip as images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from PIL import Image

from utils.common.errors import UserError

Item = TypeVar("Item")
# Frames of each clip -> captions.
Describe = Callable[[Sequence[list[Image.Image]]], list[str]]
INSTRUCTION = (
    "These pictures are frames of one video, in order. Describe the video in one paragraph: the subject, what happens, "
    "the surroundings, the light, the camera and the style. Do not mention frames or pictures."
)


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are generated.

    Attributes:
        model: name on the model hub, or folder.
        frames: number of frames that the model gets per clip.
        instruction: what the model is told; None for `INSTRUCTION`, or for nothing if the model takes no dialogue.
    """

    model: str
    frames: int
    instruction: str | None
    max_tokens: int
    batch_size: int


def check_caption_model(model: str) -> None:
    """Checks that a model turns images into text. Reads its configs only.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--caption_model {model} cannot be loaded ({_first_line(error)}).") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"--caption_model {model} is a model of type {config.model_type}, which does not describe pictures; give "
            "an image-text-to-text model of transformers."
        )
    try:
        AutoProcessor.from_pretrained(model)
    except Exception as error:  # whatever its processor raises
        raise UserError(f"--caption_model {model}: its processor cannot be loaded ({_first_line(error)}).") from error


class CaptionModel:
    """A vision-language model on the GPU, or on the CPU if there is none."""

    def __init__(self, settings: CaptionSettings) -> None:
        """Loads the model. Raises UserError if it does not fit."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype="auto")
            self.model = model.to(self.device).eval()
        except Exception as error:
            reason = "memory does not suffice" if is_out_of_memory(error) else _first_line(error)
            raise UserError(f"--caption_model {settings.model} cannot be loaded ({reason}).") from error
        self.processor = AutoProcessor.from_pretrained(settings.model)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"  # text is generated at the right end
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.takes_dialogue = bool(getattr(self.processor, "chat_template", None))

    @torch.inference_mode()
    def describe(self, clips: Sequence[list[Image.Image]]) -> list[str]:
        """Returns a caption for each clip, given its frames. Words are separated by single spaces."""
        inputs = self._inputs(clips).to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False)
        if not self.model.config.is_encoder_decoder and "input_ids" in inputs:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, clips: Sequence[list[Image.Image]]) -> Any:
        if not self.takes_dialogue:  # such a model describes one picture
            pictures = [frames[len(frames) // 2] for frames in clips]
            text = {"text": [self.settings.instruction] * len(clips)} if self.settings.instruction else {}
            return self.processor(images=pictures, return_tensors="pt", **text)
        texts = []
        for frames in clips:
            content = [*({"type": "image"} for _ in frames)]
            content.append({"type": "text", "text": self.settings.instruction or INSTRUCTION})
            dialogue = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(dialogue, add_generation_prompt=True))
        begins = self.tokenizer.bos_token
        has_begin = bool(begins) and texts[0].startswith(begins)
        return self.processor(
            text=texts, images=list(clips), padding=True, return_tensors="pt", add_special_tokens=not has_begin
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the GPU or of the host does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe_all(
    items: Iterable[tuple[Item, list[Image.Image]]], describe: Describe, settings: CaptionSettings
) -> Iterator[tuple[Item, str | Exception]]:
    """Yields the caption of each item, or the error that it caused. Items are (anything, frames).

    If memory does not suffice, the batch size is halved and stays so. The clips of a batch that fails otherwise are
    tried one by one.

    Raises:
        UserError: memory does not suffice for one clip, or no clip of the first batch can be described.
    """
    waiting, size, is_first = iter(items), settings.batch_size, True
    while batch := list(islice(waiting, size)):
        captions, size = _describe([frames for _, frames in batch], describe, size)
        errors = [caption for caption in captions if isinstance(caption, Exception)]
        if is_first and len(errors) == len(batch):
            raise UserError(f"--caption_model {settings.model} describes no clip ({_first_line(errors[0])}).")
        is_first = False
        yield from zip((item for item, _ in batch), captions, strict=True)


def _describe(clips: list[list[Image.Image]], describe: Describe, size: int) -> tuple[list[str | Exception], int]:
    """Returns the caption or the error of each clip, and the batch size to go on with."""
    captions: list[str | Exception] = []
    while batch := clips[len(captions) : len(captions) + size]:
        try:
            captions += [caption or ValueError("the model returned no text") for caption in describe(batch)]
            continue
        except Exception as error:
            failure = error.with_traceback(None)  # the traceback would keep the tensors of the batch
        if is_out_of_memory(failure) and len(batch) == 1:
            raise UserError(
                "--caption_model: memory does not suffice for one clip; use fewer --caption_frames or a smaller model."
            )
        if is_out_of_memory(failure):
            size = len(batch) // 2
            print(f"Note: memory does not suffice for {len(batch)} clips at once; going on with {size}.", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        elif len(batch) == 1:
            captions.append(failure)
        else:
            captions += [_describe([clip], describe, 1)[0][0] for clip in batch]
    return captions, size


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
