"""The vLLM plug-in: FIRP as a chain that vLLM verifies. vLLM calls `register` in each of its processes.

Nothing of firp is imported before a FIRP checkpoint is named in the speculative config. Of vLLM its configuration and
its worker's base class are.
"""

from __future__ import annotations

import logging

TESTED = ("0.32.0",)
ARCHITECTURE = "Eagle3FirpDraft"


def register() -> None:
    """The entry point `vllm.general_plugins`. A vLLM that it does not know stays as it is, with one warning."""
    try:
        from firp_vllm.hooks import install

        install()
    except Exception as error:
        logging.getLogger("vllm.firp").warning(
            "firp: the plug-in is not active in this vLLM, which has no place for it (tested: %s): %s",
            ", ".join(TESTED),
            error,
        )
