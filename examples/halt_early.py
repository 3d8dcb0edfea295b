"""Stop a block as soon as its latents stand still, and see what that saves and whether it changes the text.

colaserve up &
python examples/halt_early.py
"""

import os

from colaserve_client import Client, Sampler

PROMPT = "Kenya is a country in Africa."
STEPS = 32


def main() -> None:
    """Write the same text with several distances, and watch one block form."""
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        whole = client.generate(PROMPT, max_new_tokens=12, steps=STEPS, seed=3, preview_every=4)
        print(f"all steps: {whole.text!r}")
        for distance in (0.02, 0.1):
            stable = Sampler(steps=STEPS, stable_steps=2, stable_distance=distance)
            early = client.generate(PROMPT, max_new_tokens=12, sampler=stable, seed=3)
            left_out = early.usage.steps_saved / (early.usage.blocks * STEPS)
            kept = "the same text" if early.token_ids == whole.token_ids else repr(early.text)
            print(f"stable_distance {distance}: {left_out:.0%} of the steps left out, {kept}")
        for preview in whole.previews:
            if preview.index == 0:
                print(f"first block after step {preview.step:2}: {preview.text!r}")


if __name__ == "__main__":
    main()
