"""`firp-lm-eval`: lm-evaluation-harness with one model more, `--model firp`.

The harness (0.4.13) finds models of other packages only if somebody has imported them.
"""

from __future__ import annotations

import sys


def run() -> None:
    """Entry point: the harness's own command, arguments and all."""
    try:
        import lm_eval.__main__ as harness

        import firp.integrations.lm_eval_model  # noqa: F401 (registers the model)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        print("error: lm_eval is not installed, run: pip install 'firp_kernels[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    harness.cli_evaluate()
