"""Continue one prefix in several ways at once, choose one, and go on from the middle of it.

colaserve up &
python examples/fork.py
"""

import os

from colaserve_client import Branch, Client, Sampler, Sampling

PREFIX = "Kenya is a country in Africa. It lies in"
BRANCHES = {
    "as it comes": Branch(seed=1),
    "few steps": Branch(seed=1, sampler=Sampler(steps=2)),
    "no guidance": Branch(seed=1, sampler=Sampler(guidance_scale=1)),
    "drawn hot": Branch(seed=1, sampling=Sampling(temperature=3)),
}


def main() -> None:
    """Write four branches, then resume the first from its own first two blocks."""
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        block_size = client.info().model.block_size
        with client.fork(PREFIX, list(BRANCHES.values()), max_new_tokens=16) as blocks:
            order = [block.branch for block in blocks]
        print(f"blocks came in the order of branches {order}")
        whole = client.fork_all(PREFIX, list(BRANCHES.values()), max_new_tokens=16)
        for name, result in zip(BRANCHES, whole, strict=True):
            print(f"{name}: {result.text!r}")
        assert whole[0].latents is not None
        kept = Branch(seed=1, written=whole[0].latents[: 2 * block_size])
        [again] = client.fork_all(PREFIX, [kept], max_new_tokens=16)
        assert again.text == whole[0].text, "a branch goes on as it would have"
        print(f"from its first two blocks: {again.text!r}")


if __name__ == "__main__":
    main()
