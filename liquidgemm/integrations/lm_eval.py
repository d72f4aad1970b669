"""EleutherAI's lm-evaluation-harness on quantized models: its command, with liquidgemm imported.

    python -m liquidgemm.integrations.lm_eval run --model hf --model_args pretrained=FOLDER ...

FOLDER is what ``save_pretrained``, ``liquidgemm quantize`` or ``liquidgemm import`` wrote: to load
it, transformers has to know liquidgemm, which the harness does not import. In Python nothing is
needed: ``lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer)`` takes a model
that is quantized already.
"""

from __future__ import annotations

import sys

import liquidgemm  # noqa: F401  # registers with transformers


def main() -> None:
    """The harness's command, with the arguments of this process.

    Raises:
        SystemExit: the harness is not installed; the message says how to get it.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit(
            "lm_eval: expected EleutherAI's harness to be installed: pip install 'lm_eval[hf]'"
        )
    cli_evaluate()


if __name__ == "__main__":
    main()
