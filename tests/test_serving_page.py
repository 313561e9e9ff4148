"""The page at / in a real browser, by keyboard, at three widths, light and dark. Skips where there is no browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.generate import generate
from softprompt.inference.score import score
from softprompt.inference.settings import DecodeSettings
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import save_prompt
from test_serving import Serving, alone, prompt_of
from tiny_models import tiny_model, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NODE = shutil.which("node")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCRIPT = """
const { chromium } = require("playwright-core");
const { url, path, args, text, front, label } = JSON.parse(process.argv[2]);
(async () => {
  const browser = await chromium.launch({ executablePath: path, args });
  const seen = [];
  for (const [width, height] of [[390, 844], [768, 1024], [1440, 900]]) for (const colorScheme of ["light", "dark"]) {
    const page = await browser.newPage({ viewport: { width, height }, colorScheme });
    const problems = [], outside = [];
    page.on("console", message => { if (message.type() === "error") problems.push(message.text()); });
    page.on("pageerror", error => problems.push(String(error)));
    page.on("request", request => { if (!request.url().startsWith(url)) outside.push(request.url()); });
    await page.goto(url + "/#" + new URLSearchParams({ models: "base,support", input: text, text: front, tokens: "12" }));
    await page.waitForSelector("#models input");
    await page.focus("#input");
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => [...document.querySelectorAll("#columns .facts")].filter(each => each.textContent).length === 3);
    const answers = await page.$$eval("#columns .answer", all => all.map(each => each.textContent));
    await page.$$eval("details", all => all.forEach(each => { each.open = true; }));
    await page.fill("#answer", " jumps");
    await page.focus("#score");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#scores .token");
    await page.focus("#scores .column:nth-child(2) .token");
    const detail = await page.textContent("#scores .column:nth-child(2) .detail");
    const scores = await page.$$eval("#scores h2", all => all.map(each => each.textContent));
    await page.fill("#rows", `${text}\\t${label}\\nno gold`);
    await page.focus("#run");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelectorAll("#matrix tr").length === 6);
    const code = await page.textContent("#code");
    await page.click("#link");
    const again = await browser.newPage({ viewport: { width, height }, colorScheme });
    await again.goto(page.url());
    await again.waitForSelector("#models input");
    const state = view => view.evaluate(() => ({
      values: ["input", "text", "tokens", "temperature", "answer", "rows"].map(id => document.getElementById(id).value),
      models: [...document.querySelectorAll("#models input:checked")].map(box => box.value),
    }));
    const restored = JSON.stringify(await state(again)) === JSON.stringify(await state(page));
    await again.close();
    seen.push({ restored,
      answers, detail, scores, problems, outside, width, colorScheme,
      overflow: await page.evaluate(() => document.documentElement.scrollWidth - innerWidth),
      background: await page.evaluate(() => getComputedStyle(document.body).backgroundColor),
      right: await page.$$eval("#matrix td.right", all => all.length),
      wrong: await page.$$eval("#matrix td.wrong", all => all.length),
      figures: await page.$$eval("#matrix tr", all => all.slice(3).map(line => [...line.children].map(each => each.textContent))),
      code,
    });
    await page.close();
  }
  await browser.close();
  console.log(JSON.stringify(seen));
})().catch(error => { console.error(error); process.exit(1); });
"""


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def serving(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("page")
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine)
        for seed, name in enumerate(("support", "greet")):
            save_prompt(prompt_of(lm, seed, name), folder / name)
            catalogue.add(folder / name)
        server = Serving(engine, catalogue)
        yield server
        server.close()


def test_the_page_answers_scores_and_marks_by_keyboard_at_every_width(
    serving: Serving, lm: FrozenLM, tmp_path: Path
) -> None:
    if CHROMIUM is None or NODE is None:
        pytest.skip("needs chromium and node")
    if subprocess.run(
        [NODE, "-e", "require('playwright-core')"], capture_output=True, cwd=tmp_path
    ).returncode:
        pytest.skip("needs playwright-core where node finds it (NODE_PATH): npm install playwright-core")
    text, front = "The quick brown fox", "I want "
    support = prompt_of(lm, 0, "support")
    wanted = [alone(lm, None, text), alone(lm, support, text), alone(lm, None, front + text)]
    label = wanted[1].strip().split("\n")[0].strip()
    asked = {
        "url": serving.url,
        "path": CHROMIUM,
        "args": FLAGS,
        "text": text,
        "front": front,
        "label": label,
    }
    script = tmp_path / "page.js"
    script.write_text(SCRIPT, encoding="utf-8")
    run = subprocess.run(
        [NODE, str(script), json.dumps(asked)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert run.returncode == 0, run.stderr
    pages: list[dict[str, Any]] = json.loads(run.stdout)
    assert len(pages) == 6
    (scored,) = score(lm, [text], label, support, end="auto")
    loss = -scored.log_probability / len(scored.token_ids)
    jumps = [score(lm, [text], " jumps", prompt)[0].log_probability for prompt in (None, support)]
    for page in pages:
        assert (page["problems"], page["outside"]) == ([], [])
        assert page["overflow"] <= 0
        assert page["restored"]
        assert "curl http" in page["code"]
        assert page["answers"] == [answer.lstrip("\n") or "(nothing)" for answer in wanted]
        assert page["scores"] == [f"base: {jumps[0]:.2f} nats", f"support: {jumps[1]:.2f} nats"]
        assert len(page["detail"].splitlines()) == 6
        assert page["right"] >= 1
        assert page["right"] + page["wrong"] == 2  # of two models; the row without a right answer has no mark
        assert [line[0] for line in page["figures"]] == ["accuracy", "macro f1", "nll"]
        assert [line[-1].split(" ")[0] for line in page["figures"]] == ["1.000", "1.000", f"{loss:.3f}"]
        assert "from openai import OpenAI" in page["code"]
    light, dark = (
        {page["background"] for page in pages if page["colorScheme"] == scheme}
        for scheme in ("light", "dark")
    )
    assert not light & dark


def test_the_figures_of_answered_rows_are_those_of_evaluate(
    serving: Serving, lm: FrozenLM, tmp_path: Path
) -> None:
    """Right and wrong labels, one of them never answered; and texts that are no labels."""
    learned = replace(prompt_of(lm, 3, "labelled", "{soft:4}{text}{label}"), target="label")
    save_prompt(learned, tmp_path / "labelled")
    serving.catalogue.add(tmp_path / "labelled")
    texts = ["The quick brown fox", "Tweet: my order", "I want you", "a", "thank you", "nobody answers!"]
    bare = prompt_of(lm, 3, "labelled", "{soft:4}{text}")
    said = [row.text for row in generate(lm, texts, bare, DecodeSettings(max_new_tokens=6, stop=("\n",)))]
    wanted = [said[0].strip() or "x", said[0].strip() or "x", "no", "no", "no", said[5].strip() or "x"]
    as_labels, as_texts = ["accuracy", "macro_f1", "nll"], ["rouge_l", "chrf", "nll", "bits_per_byte"]
    for labels, metrics in ((wanted, as_labels), ([f"a text, number {row}" for row in range(6)], as_texts)):
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        settings = JudgeSettings(max_new_tokens=6, stop=["\n"], metrics=metrics)
        judged = evaluate(learned, rows, base=lm, settings=settings, progress=False)
        answered = [
            {"input": text, "wanted": label, "answer": answer}
            for text, label, answer in zip(texts, labels, said, strict=True)
        ]
        asked = {"model": "labelled", "rows": answered}
        response = httpx.post(f"{serving.url}/v1/softprompt/figures", json=asked, timeout=60)
        figures = response.json()["figures"]
        assert list(figures) == list(judged.estimates)
        for name, estimate in judged.estimates.items():
            about = figures[name]
            assert about["n"] == estimate.n == 6
            assert about["value"] == pytest.approx(estimate.value, rel=1e-5), name
            assert about["stderr"] == pytest.approx(estimate.stderr, rel=1e-4), name


def test_the_page_is_small_and_may_run_nothing_but_itself(serving: Serving) -> None:
    answer = httpx.get(serving.url)
    assert len(answer.content) < 60_000
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2  # its one script, its one style
    assert "http" not in policy
