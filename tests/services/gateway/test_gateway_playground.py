"""The page at /playground, used in a browser, in front of the bundled checkpoint."""

import ast
import asyncio
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from colaserve_client.latents import load_latents
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.server import serve
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.auth import Keys
from tests.services.gateway.browser import CHROMIUM, NAMELESS, PALE, WIDTH, chromium, opened
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import running
from tests.services.launch.processes import FREE_PORTS, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]
TOOLS = ("write", "latents", "walk", "infill", "grid")
FIRST_ANSWER = 10.0  # seconds from opening the page


@dataclass(frozen=True)
class Served:
    """A browser, and where the page is and what it calls."""

    browser: Browser
    url: str
    grpc: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    with started(tmp_path_factory.mktemp("up"), "up", "--threads=1", *FREE_PORTS, model=None) as up:
        async with chromium() as browser:
            yield Served(browser, up.http, up.target)


async def begun(page: Page, tool: str) -> Locator:
    """A tool after its main button was pressed."""
    await page.locator(f"nav a[href='#{tool}']").click()
    section = page.locator(f"#tool-{tool}")
    await section.locator("button.main").click()
    await expect(section.locator(".result")).to_be_visible()
    return section


async def used(page: Page, tool: str) -> Locator:
    """A tool whose work is done. It fits the page, each control has a name, and each text can be read."""
    section = await begun(page, tool)
    await done(page, section)
    return section


async def done(page: Page, section: Locator) -> None:
    """The same of a tool that was begun."""
    await expect(section).not_to_have_attribute("aria-busy", "true")
    await expect(section.locator(".error")).to_be_empty()
    assert await page.evaluate(WIDTH) <= page.viewport_size["width"]
    assert await page.evaluate(PALE) == []
    assert await page.evaluate(NAMELESS) == []


async def exported(page: Page, folder: Path, target: str = "") -> tuple[list[str], str, dict[str, object]]:
    """The export's curl lines, its Python (or what that prints, run against a target) and its latents."""
    if await page.locator("#export").get_attribute("open") is None:
        await page.locator("#export summary").click()
    curl, python = [await page.locator(f"#{name}").inner_text() for name in ("curl", "python")]
    ast.parse(python)
    if target:
        code = python.replace('"127.0.0.1:50051"', repr(target))
        python = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", code], text=True, cwd=folder)
    if not await page.locator("#save").is_visible():
        return curl.splitlines(), python, {}
    async with page.expect_download() as saving:
        await page.locator("#save").click()
    await (await saving.value).save_as(folder / "saved.safetensors")
    return curl.splitlines(), python, load_latents(folder / "saved.safetensors")


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (360, 740, "dark")])
async def test_each_tool_does_its_work(served: Served, tmp_path: Path, width: int, height: int, scheme: str):
    began = time.monotonic()
    async with opened(served.browser, served.url, width, height, color_scheme=scheme) as page:
        await page.locator("body[data-ready]").wait_for()
        if width < 800:  # where the settings are closed at first
            await page.locator("#settings summary").click()
            await page.locator("#steps").fill("8")
        write, text = await begun(page, "write"), page.locator("#text")
        await expect(text).to_contain_text("country in Europe")
        assert time.monotonic() - began < FIRST_ANSWER
        await done(page, write)
        whole = await text.inner_text()
        await page.locator("#scrub").press("Home")  # previews are left out where there is no time for them
        await expect(write.locator("output")).to_have_text(re.compile(r"block 1, step \d+"))
        assert await page.locator("#strip canvas").count() >= 2
        await expect(page.locator("#probes")).to_contain_text("entropy")
        [curl], printed, saved = await exported(page, tmp_path, served.grpc)
        assert f"{await page.locator('#prompt').input_value()}{printed}" == f"{whole}\n"
        assert saved["latents"] == load_latents(tmp_path / "write.safetensors")["latents"]
        url, body = shlex.split(curl)[2], json.loads(shlex.split(curl)[-1])
        async with httpx.AsyncClient(timeout=20) as http:
            again = await http.post(url, json={name: body[name] for name in body.keys() & {"prompt", "seed", "steps"}})
        assert body["prompt"] + again.json()["choices"][0]["text"] == whole

        latents = await used(page, "latents")
        assert len(await page.locator("#map g").all()) == 9
        await page.locator("#list button").nth(1).click()
        await expect(latents.locator("#heat-title")).to_contain_text("Tokyo")
        await page.locator("#heat canvas").press("ArrowRight")
        _, _, saved = await exported(page, tmp_path)
        number = saved["text_001"].values[0, 1]
        await expect(page.locator("#reading")).to_have_text(f"position 0, channel 1: {number:.3f}")

        await used(page, "walk")
        await page.locator("#way").press("End")
        await expect(page.locator("#there")).to_have_text("The capital of Japan is Tokyo.")
        assert (await exported(page, tmp_path, served.grpc))[1].endswith("1.00 The capital of Japan is Tokyo.\n")

        await used(page, "infill")
        assert await page.locator("#filled mark").all_inner_texts() == [" Asia", " Tokyo"]
        assert (await exported(page, tmp_path, served.grpc))[1] == f"{await page.locator('#filled').inner_text()}\n"

        await page.locator("nav a[href='#grid']").click()
        await page.locator("#scales").fill("1, 2")
        await page.locator("#counts").fill("2, 16")
        await used(page, "grid")
        cells = await page.locator("#tool-grid td").all_inner_texts()
        assert len(cells) == 4
        assert "Tokyo" in cells[-1]
        curls, printed, _ = await exported(page, tmp_path, served.grpc)
        assert printed.endswith("16 2  Tokyo\n")
        assert json.loads(shlex.split(curls[-1])[-1]).items() >= {"steps": 16, "guidance_scale": 2}.items()

        await page.goto(f"{served.url}/docs")
        assert await page.evaluate(WIDTH) <= width
        assert await page.evaluate(PALE) == []


async def test_the_map_shows_the_principal_components(served: Served):
    points = np.random.default_rng(0).normal(size=(20, 5)) * [5, 3, 1, 1, 1]
    async with opened(served.browser, served.url) as page:
        found = await page.evaluate(
            "async (points) => (await import('/playground/latents.js')).components(points)", points.tolist()
        )
    centred = points - points.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    for component, value, axis in zip(found, values[::-1], axes.T[::-1], strict=False):
        places = centred @ axis
        places *= np.sign(places @ component["places"])
        np.testing.assert_allclose(component["places"], places, atol=1e-6)
        assert component["share"] == pytest.approx(value / values.sum())


async def test_a_keyboard_is_enough(served: Served):
    async with opened(served.browser, served.url) as page:
        await page.locator("body[data-ready]").wait_for()
        await page.locator("#steps").fill("2")
        await page.locator("#settings summary").press("Enter")  # closed, so that its fields are passed
        met = []
        for _ in range(12):
            await page.keyboard.press("Tab")
            met.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
            assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if met[-1] == "prompt":
                break
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#tool-write [role=status]")).to_contain_text("tokens in")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "scrub"
        before = await page.locator("#scrub").input_value()
        await page.keyboard.press("ArrowLeft")
        assert int(await page.locator("#scrub").input_value()) == int(before) - 1


async def test_a_setting_out_of_range_and_a_refusal_are_said(served: Served):
    async with opened(served.browser, served.url, refused=400) as page:
        error = page.locator("#tool-write .error")
        await page.locator("#steps").fill("0")
        await page.locator("#tool-write button.main").click()
        await expect(error).to_contain_text("steps: ")
        await page.locator("#steps").fill("")
        await page.locator("#max_tokens").fill("100000")
        await page.locator("#tool-write button.main").click()
        await expect(error).to_contain_text("8192 fit")


async def test_a_key_is_asked_for_and_kept_in_memory_alone(served: Served):
    settings = GatewaySettings(keys=Keys(["person right"]))
    async with running(FakeGeneration(), settings) as gateway, opened(served.browser, gateway.url, refused=401) as page:
        await page.locator("#key").press("Escape")
        await page.get_by_role("button", name="Try again").click()
        for key in ("wrong", "right"):
            await page.locator("#key").fill(key)
            await page.locator("#ask button").click()
            if key == "wrong":
                await expect(page.locator("#ask .error")).to_contain_text("does not know")
        await expect(page.locator("#model")).to_contain_text("fake/cola")
        await used(page, "grid")
        [line, *_], python, _ = await exported(page, Path())
        assert "$COLASERVE_KEY" in line
        assert "COLASERVE_KEY" in python
        assert await page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        await page.reload()
        await expect(page.locator("#ask")).to_be_visible()


async def test_what_a_model_writes_is_text_and_never_markup(served: Served):
    fake = FakeGeneration(says="<img src=x onerror=alert(1)><script>alert(2)</script>", model_name="<b>bold</b>")
    async with running(fake) as gateway, opened(served.browser, gateway.url) as page:
        await used(page, "grid")
        await expect(page.locator("#tool-grid td").first).to_contain_text("<img src=x onerror=alert(1)>")
        assert await page.locator("#tool-grid img, #tool-grid script, #model b").count() == 0


@pytest.mark.parametrize("keys", [None, Keys(["right"])])
async def test_other_machines_get_the_page_only_where_keys_are_needed(keys: Keys | None):
    server = await serve(create_app(object(), GatewaySettings(keys=keys)), "0.0.0.0", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
            page, script = await http.get("/playground"), await http.get("/playground/main.js")
            assert {page.status_code, script.status_code} == {404 if keys is None else 200}
            assert ('href="playground"' in (await http.get("/")).text) == (keys is not None)
            if keys is not None:
                assert "script-src 'self';" in page.headers["content-security-policy"]
                assert script.headers["content-type"].startswith("text/javascript")
    finally:
        await server.stop(grace=0.1)
