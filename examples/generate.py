"""Continue a prompt: whole, as a stream of blocks, and again from its seed, with what the model thought of each block.

colaserve up &
python examples/generate.py
"""

import os

from colaserve_client import Client

PROMPT = "Question: What is the capital of Japan? Answer:"


def main() -> None:
    """Ask one question in three ways."""
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        result = client.generate(PROMPT, top_logprobs=2)
        print(f"{PROMPT}{result.text}  [{result.finish_reason}, {result.usage.completion_tokens} tokens]")
        for token in result.logprobs:
            likely = ", ".join(f"{each.text!r} {each.logprob:.2f}" for each in token.top)
            print(f"  {token.text!r}: {likely}")
        again = client.generate(PROMPT, seed=result.seed, with_probes=True)
        assert again.text == result.text, "the seed repeats the run"
        print(f"again from {result.seed}: the mean entropy of the first block is {again.probes[0].entropy:.4f} nats")
        with client.stream("France is a country in Europe. Its capital is", max_new_tokens=24) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
