"""Train a probe of the latent space with numpy, in a second, and steer with it what is written.

The probe reads one latent and says whether it is the word for a continent, here Europe. The demo checkpoint knows where
each country lies; steered, it says Europe of all of them.

    colaserve up &
    python examples/steer.py
"""

import os

import numpy as np
from numpy.typing import NDArray

from colaserve_client import Client, Latents, Steering

LIES = {
    "Europe": "France Spain Italy Greece Norway Sweden Poland Austria Finland Ireland Portugal Hungary",
    "Asia": "Japan China India Vietnam Nepal Thailand Mongolia Iraq Jordan Oman",
    "Africa": "Kenya Egypt Ghana Mali Chad Niger Angola Zambia Uganda Tunisia",
    "South America": "Peru Chile Bolivia Ecuador Uruguay",
}
Points = NDArray[np.float32]
ASKED = ("Germany", "South Korea", "Morocco", "Brazil")


def main() -> None:
    """Train on some countries, ask about others."""
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        known = [(country, place) for place, countries in LIES.items() for country in countries.split()]
        sentences = [(f"{country} is a country in", place) for country, place in known]
        begun = [len(each.token_ids) for each in client.encode_text([prompt for prompt, _ in sentences])]
        whole = client.encode_text([f"{prompt} {place}." for prompt, place in sentences])
        latents = Latents.concat(each.latents[position] for each, position in zip(whole, begun, strict=True)).values
        is_europe = np.array([place == "Europe" for _, place in sentences])
        weights, bias = trained(latents, is_europe)
        right = np.mean((latents @ weights + bias > 0) == is_europe)
        print(f"probe of {len(sentences)} latents: {right:.0%} right")
        for scale in (0.0, 5.0, 20.0):
            probe = Steering(weights, bias, scale=scale, logistic=True)
            prompts = [f"{country} is a country in" for country in ASKED]
            texts = [client.generate(each, max_new_tokens=2, seed=1, steering=[probe]).text for each in prompts]
            print(f"scale {scale:g}: " + ", ".join(f"{c}{t!r}" for c, t in zip(ASKED, texts, strict=True)))


def trained(points: Points, labels: NDArray[np.bool_], steps: int = 2000) -> tuple[Points, Points]:
    """Logistic regression of points (n, d) by gradient descent: weights (d) and bias ()."""
    weights, bias = np.zeros(points.shape[1]), 0.0
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(-(points @ weights + bias))) - labels
        weights -= 0.1 * (points.T @ wrong / len(points) + 0.01 * weights)
        bias -= 0.1 * float(wrong.mean())
    return weights.astype(np.float32), np.array(bias, np.float32)


if __name__ == "__main__":
    main()
