"""What a checkpoint's card says is told, and a missing or broken card stops nothing."""

from colaserve_services.launch.card import MOST, description
from colaserve_services.launch.options import DEMO


def test_the_first_paragraph_is_the_description(tmp_path):
    (tmp_path / "MODEL_CARD.md").write_text("# Name\n\n**It knows** sums\nand `names`.\n\nMore.\n")
    assert description(tmp_path) == "It knows sums and names."
    (tmp_path / "MODEL_CARD.md").write_text("x" * 5000)
    assert description(tmp_path) == "x" * MOST


def test_no_card_or_one_that_is_no_text_is_no_description(tmp_path):
    assert description(tmp_path) == ""
    (tmp_path / "MODEL_CARD.md").write_bytes(b"\xff\xfe")
    assert description(tmp_path) == ""


def test_the_bundled_card_says_what_the_model_knows_and_what_it_does_not():
    assert "197 countries" in description(DEMO)
    assert "knows nothing else" in description(DEMO)
