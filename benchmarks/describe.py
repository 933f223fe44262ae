"""Overhead of the describer compared with the bare `openai` client.

`python benchmarks/describe.py` requests one text per image from a local server that responds immediately, in turns with
a bare loop of `AsyncOpenAI.chat.completions.create` that sends the same messages and discards the replies. The
describer's time includes everything: reading the captions, sending the requests, storing every reply, the quality gates
and writing the descriptions.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from timing import median_seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import openai

from nanovlm_hf.chat.client import Endpoint, ask_all
from nanovlm_hf.chat.replies import ReplyStore
from nanovlm_hf.data.describe import Describer, DescribeSettings, messages_of, packaged_prompt
from nanovlm_hf.data.sources import read_captions

from helpers.captions import write_captions
from helpers.servers import serve


def describe(captions: Path, out: Path, endpoint: Endpoint) -> None:
    settings = DescribeSettings(endpoint.model, {"short": packaged_prompt("short")})
    with ReplyStore(out) as store:
        describer = Describer(read_captions(captions), settings, store)
        failures = describer.run(lambda requests, total: ask_all(endpoint, requests, store))
        report = describer.write(out, failures)
    assert report["variants"]["short"]["rejected"] == 0


async def bare(captions: Path, endpoint: Endpoint) -> None:
    prompt = packaged_prompt("short")
    photos = iter(read_captions(captions))
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none") as client:

        async def work() -> None:
            for photo in photos:
                await client.chat.completions.create(
                    model=endpoint.model, messages=messages_of(prompt, photo.captions), max_completion_tokens=120
                )

        await asyncio.gather(*(work() for _ in range(endpoint.concurrency)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.pop("OPENAI_API_KEY", None)
    with tempfile.TemporaryDirectory() as folder:
        captions = write_captions(Path(folder) / "captions.json", arguments.photos)
        with serve("chat_server.py", Path(folder) / "server") as server:
            endpoint = Endpoint("instant", base_url=f"{server.url}/v1", concurrency=arguments.concurrency)
            calls = {
                "bare client": lambda number: asyncio.run(bare(captions, endpoint)),
                "describer": lambda number: describe(captions, Path(folder) / f"out{number}", endpoint),
            }
            plain, whole = median_seconds(calls, arguments.rounds, warm_up=1).values()
    print(f"{arguments.photos} images, one text each, {arguments.concurrency} concurrent requests, instant replies")
    print(f"bare openai client, replies discarded  {1000 * plain / arguments.photos:.2f} ms per image")
    print(f"describer, everything                  {1000 * whole / arguments.photos:.2f} ms per image")
    print(f"ratio                                  {whole / plain:.2f}")


if __name__ == "__main__":
    main()
