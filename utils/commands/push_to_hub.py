"""Publishes a checkpoint on the model hub, with a model card.

python -m utils.commands.push_to_hub --checkpoint outputs/t2v-lora/checkpoint-500 --name my-kitten
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import exit_on_user_error
from utils.config.options import make_parser, option, parse_group
from utils.run.hub import check_hub, find_weights, push
from utils.run.model_card import read_publication


@dataclass(frozen=True)
class PushArgs:
    checkpoint: Path = option(help="folder checkpoint-N of a run, LoRA or full fine-tuning")
    name: str = option(help="name of the repository, as NAME, USER/NAME or ORGANIZATION/NAME")
    private: bool = option(True, help="whether a new repository is private; an existing one stays as it is")

    def errors(self) -> Iterator[str]:
        yield from ()


def main() -> None:
    args = parse_group(
        make_parser("Publishes a checkpoint on the model hub.", prog="python -m utils.commands.push_to_hub"), PushArgs
    )
    read_publication(args.checkpoint)
    find_weights(args.checkpoint)
    name = check_hub(args.name, "--name")
    print(f"Published {push(args.checkpoint, name, args.private, '--name')}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
