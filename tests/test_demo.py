"""The demo: words as they come, the page in a real browser, and the same page as a Space."""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import only_line, picture, tiny_model, tiny_processor
from huggingface_hub import RepoCard
from PIL import Image
from servers import serve
from test_push import online

from nanovlm_hf import InputError, completion
from nanovlm_hf.hub_cards.space import app

CHROMIUM = shutil.which("chromium")
HEADLESS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "ball.png"
    picture(size=(300, 200)).save(path)
    return path


def test_words_come_one_after_another(tokenizer):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    image = picture()
    said = list(completion.stream(model, processor, image, " There is a big "))
    assert len(said) > 5
    assert all(text.startswith("There is a big") for text in said)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(said))


def test_the_words_are_those_of_complete(photo):
    model, processor = completion.load_model("mini-short")
    (whole,) = completion.complete(model, processor, [photo], "There is a", blind=True)
    said = list(app.complete(str(photo), "There is a", "mini", "short"))
    assert said[-1] == (whole.texts[0], whole.blind[0])
    assert len(said) > 10
    assert said[0][1] == ""


def test_an_error_while_it_speaks_reaches_the_caller(tokenizer, monkeypatch):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(completion.stream(model, processor, picture()))
    with pytest.raises(InputError, match="leave no room"):
        list(completion.stream(model, processor, picture(), "word " * 400))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running(command, port, **options):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "the page does not come"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                yield f"http://127.0.0.1:{port}/"
                return
            except OSError:
                time.sleep(0.3)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def address():
    port = free_port()
    with running([sys.executable, "-m", "nanovlm_hf.cli", "demo", "--port", str(port)], port) as url:
        yield url


@pytest.fixture
def browser(address):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=HEADLESS)
        yield chromium
        chromium.close()


def open_page(browser, address, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(20_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Complete", exact=True).wait_for()
    return page, asked


def complete_on(page, photo):
    page.locator("input[type=file]").first.set_input_files(photo)
    page.locator(f"img[src*='{photo.name}']").first.wait_for()
    page.get_by_role("button", name="Complete", exact=True).click()
    seen, unseen = page.locator("#looking textarea"), page.locator("#blind textarea")
    deadline = time.monotonic() + 60
    while not re.search(r"[.!?]$", unseen.input_value()):
        assert time.monotonic() < deadline, "no words come"
        page.wait_for_timeout(50)
    return seen.input_value(), unseen.input_value()


def test_a_visitor_uploads_and_reads(browser, address, photo):
    page, asked = open_page(browser, address)
    page.get_by_label("How the sentence begins").fill("There is a big")
    seen, unseen = complete_on(page, photo)
    assert seen.startswith("There is a big ")
    assert unseen.startswith("There is a big ")
    assert seen != unseen
    longer, _ = open_page(browser, address)
    longer.get_by_label("long (60 to 70 words)").check()
    assert len(complete_on(longer, photo)[0].split()) > 1.5 * len(seen.split())
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], "nothing goes elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_it_fits_the_window(browser, address, photo, width, scheme):
    page, _ = open_page(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    complete_on(page, photo)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", background).group())
    assert red < 64 if scheme == "dark" else red > 192


@pytest.mark.slow
def test_what_a_visitor_does_wrong(browser, address, tmp_path, photo):
    page, _ = open_page(browser, address)
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("Choose a photo first.").wait_for()
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    page.locator("input[type=file]").first.set_input_files(broken)
    page.locator("img[src*='broken.png']").first.wait_for(state="attached")
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("broken.png").last.wait_for()


def test_no_gradio_and_a_taken_port(run, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        code, _, errors = run("demo", "--port", port)
    assert code == 1
    assert str(port) in only_line(errors)
    monkeypatch.delitem(sys.modules, "nanovlm_hf.hub_cards.space.app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = run("demo")
    assert code == 2
    assert "pip install 'nanovlm-hf[demo]'" in only_line(errors)


def test_example_photos_can_be_shown():
    folder = Path(app.__file__).parent / "examples"
    told = (folder / "README.md").read_text()
    assert {path.stem for path in folder.glob("*.jpg")} == set(app.EXAMPLES)
    for name in app.EXAMPLES:
        assert re.search(rf"- `{name}.jpg`: .*(CC0|public domain)", told)
        assert max(Image.open(folder / f"{name}.jpg").size) <= 400


@pytest.mark.slow
def test_a_space_is_the_same_page(tmp_path):
    with serve("hub_server.py", tmp_path / "hub") as hub:
        environment = online(hub, tmp_path / "home")
        command = [sys.executable, "-m", "nanovlm_hf.cli", "demo", "--push", "org/demo"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{hub.url}/spaces/org/demo"]
        assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == 1
        fetch = "import sys, huggingface_hub as hub; "
        fetch += "hub.snapshot_download('org/demo', repo_type='space', local_dir=sys.argv[1])"
        subprocess.run([sys.executable, "-c", fetch, tmp_path / "space"], env=environment, check=True)
    space = tmp_path / "space"
    card = RepoCard.load(space / "README.md", ignore_metadata_errors=False)
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    assert "gradio" not in (space / "requirements.txt").read_text()
    port = free_port()
    # The package that is beside the page, not the one that is installed here.
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(space)}
    with running([sys.executable, "app.py"], port, cwd=space, env=environment):
        pass
    check = "import nanovlm_hf, pathlib; print(pathlib.Path(nanovlm_hf.__file__).parents[1])"
    done = subprocess.run([sys.executable, "-c", check], cwd=space, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(space)
