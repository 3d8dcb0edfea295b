"""Debian's Chromium without a window, and what tests look at in a page."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from playwright.async_api import Browser, Page, async_playwright, expect

from tests.waiting import PATIENCE

# CI sets the variable, and fails where there is no such browser; elsewhere tests that need one are skipped.
CHROMIUM: Final = os.environ.get("CHROMIUM") or shutil.which("chromium")
_QUIET: Final = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync")  # fmt: skip

# Text elements, as "contrast text", whose colour is too close to what is behind it.
PALE: Final = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const { backgroundColor: color } = getComputedStyle(node);
      if ((numbers(color)[3] ?? 1) === 1) return color;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()).flatMap((node) => {
    const own = [...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE);
    const text = own.map((child) => child.data).join("").trim() || node.value || node.placeholder;
    const part = node.placeholder && !node.value ? "::placeholder" : null;
    const { color, fill } = getComputedStyle(node, part);
    if (node instanceof SVGTextElement) return [[contrast(fill, getComputedStyle(node.previousSibling).fill), text]];
    return text ? [[contrast(color, behind(node)), text]] : [];
  });
  return found.filter(([ratio]) => ratio < 4.5).map(([ratio, text]) => `${ratio.toFixed(2)} ${text}`);
}"""
# Controls that a screen reader could not name.
NAMELESS: Final = """() => [...document.querySelectorAll("input, select, textarea, button, [tabindex], [role=img]")]
  .filter((node) => node.checkVisibility() && !node.labels?.length && !node.getAttribute("aria-label")
    && !node.textContent.trim()).map((node) => node.outerHTML)"""
WIDTH: Final = "() => document.documentElement.scrollWidth"

expect.set_options(timeout=1000 * PATIENCE)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A running browser."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET, chromium_sandbox=False)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(
    browser: Browser, url: str, width: int = 1280, height: int = 800, refused: int = 0, **look: Any
) -> AsyncIterator[Page]:
    """A page, whose console must stay empty and which asks no other host for anything. The browser itself writes about
    each answer of status 400 and above: `refused` is one that must come."""
    context = await browser.new_context(viewport={"width": width, "height": height}, **look)
    page = await context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith((url, "blob:")) else None)
    try:
        await page.goto(f"{url}/playground")
        yield page
        expected = [line for line in said if refused and f"the server responded with a status of {refused}" in line]
        assert said == expected, said
        assert bool(expected) == bool(refused)
    finally:
        await context.close()
