"""What vLLM calls when it starts (entry point ``vllm.general_plugins``): idle without ``RHEOSTAT_ADAPTER``."""

import os

ADAPTER = "RHEOSTAT_ADAPTER"  # the environment variable that names the adapter's folder


def register() -> None:
    """Make this process's vLLM know the adapter that the environment names.

    Raises:
        RheostatError: in one line, and vLLM does not start: see :func:`rheostat.serving.vllm_plugin.install`.
    """
    if os.environ.get(ADAPTER):
        # not at the top: vLLM forgives a plug-in that cannot be imported, and would serve without the adapter
        from rheostat.serving.vllm_plugin import install

        install()
