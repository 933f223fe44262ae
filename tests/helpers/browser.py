"""Headless Chromium, for tests of web pages."""

import shutil
import subprocess

CHROMIUM = shutil.which("chromium")


def browse(address, *options):
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        *options,
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
