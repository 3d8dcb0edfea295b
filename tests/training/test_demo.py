"""The recipe repeats itself to the byte, and the bundled checkpoint is what it says."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from colaserve_training import demo

BUNDLED = Path(str(files("colaserve_services").joinpath("demo")))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shortened():
    recipe = demo.DemoRecipe(seed=3).scaled(vae_steps=3, prior_steps=3)
    return replace(recipe, prior=replace(recipe.prior, rows=8), polish=replace(recipe.polish, rows=8))


@pytest.mark.timeout(300)
def test_a_shortened_recipe_run_twice_with_two_threads_gives_the_same_bytes(tmp_path):
    torch.set_num_threads(2)
    for name in "ab":
        demo.make_demo(tmp_path / name, tmp_path / f"{name}-run", shortened(), quiet=True)
    one, two = content(tmp_path / "a"), content(tmp_path / "b")
    assert one == two
    assert one.keys() == content(BUNDLED).keys() - {"MODEL_CARD.md", "true_sentences.tsv"}


def test_the_bundle_is_small_has_its_card_and_answers_its_questions():
    found = content(BUNDLED)
    assert sum(map(len, found.values())) <= 10_000_000
    assert "MODEL_CARD.md" in found
    generator = demo.load_generator(BUNDLED)
    prompts = ["Question: What is the capital of France? Answer:", "User: What is 3 + 4?\nAssistant:"]
    assert generator.texts(prompts) == [" Paris", " 7"]
    samples = {
        "capital_held_out_phrasings": 197,
        "continent_trained_phrasings": 61,
        "completions": 45,
        "paragraphs": 40,
    }
    for name, every in samples.items():
        assert demo.score_sets(generator, [name], every)["tasks"][name]["accuracy"] >= 80
