"""Every verb: what it prints for people, for machines, and how it fails."""

from pathlib import Path

import pytest

from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve_client import Latents, load_latents
from colaserve_client.arrays import tensor_from_array
from colaserve_client.cli import chat, exits
from tests.client.behaviour import Behaviour
from tests.client.cli.conftest import Run
from tests.client.fakes import SPACE, STORY, FakeServer, Prior, start_server

STORY_TEXT = STORY.decode()


# generate


def test_generate_prints_the_text_and_takes_one_that_begins_with_a_dash(run: Run, behaviour: Behaviour) -> None:
    done = run("generate", "Once")
    assert (done.code, done.out, done.err) == (0, STORY_TEXT + "\n", "")
    assert run("generate", "Once", "--echo").out == f"Once{STORY_TEXT}\n"
    assert run("generate", "--", "--echo").out == STORY_TEXT + "\n"
    assert behaviour.requests[-1].prompt == "--echo"


def test_generate_gives_machines_everything(run: Run) -> None:
    reported = run(
        "generate", "Once", "--json", "--seed", "7", "--sample-id", "2", "--latents", "--top-logprobs", "1"
    ).json
    assert (reported["prompt"], reported["text"], reported["finish_reason"]) == ("Once", STORY_TEXT, "stop")
    assert reported["seed"] == {"base_seed": 7, "sample_id": 2}
    assert reported["latents"]["space"] == SPACE
    assert reported["latents"]["shape"] == [len(STORY), 2]
    assert reported["logprobs"][0]["top"] == [{"token_id": STORY[0], "logprob": -0.5, "text": " "}]
    assert "".join(reported["tokens"]) == STORY_TEXT


def test_stats_go_to_standard_error(run: Run) -> None:
    done = run("generate", "Once", "--stats", "--seed", "7")
    assert done.out == STORY_TEXT + "\n"
    assert "28 tokens after 4 of the prompt, 7 blocks (0 wasted)" in done.err
    assert "--seed 7" in done.err


def test_the_prompt_comes_from_argument_file_or_standard_input(run: Run, behaviour: Behaviour, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n\n")
    assert run("generate", "--file", file).code == 0
    assert run("generate", stdin="héllo\n").code == 0
    assert run("generate", "--file", "-", stdin="dash").code == 0
    assert run("generate", "").code == 0
    assert run("generate", stdin=b"\xef\xbb\xbfmarked\r\n").code == 0
    assert [request.prompt for request in behaviour.requests] == ["two\nlines\n", "héllo", "dash", "", "marked"]
    assert run("generate", "a", "--file", file).code == 2
    bad = run("generate", stdin=b"a\n\xff")
    assert (bad.code, "standard input:2: byte 0xff is not UTF-8" in bad.err) == (2, True)


def test_every_option_reaches_the_server(run: Run, behaviour: Behaviour, tmp_path: Path) -> None:
    probe = tmp_path / "probe.json"
    probe.write_text('{"direction": [1, 2], "scale": -2}')
    latents = "--steps 3 --guidance-scale 1.5 --solver ab2 --guidance-start 0.75 --guidance-end 0.25 --resamples 2"
    tokens = "--temperature 0.5 --top-k 4 --top-p 0.25 --repetition-penalty 1.5 --sampling-seed 9"
    own = "--max-new-tokens 5 --stop x --stop y --ignore-end --seed 1 --sample-id 2 --cache-salt mine --print-special"
    latents += " --stable-steps 2 --stable-distance 0.5 --steering"
    assert run("generate", "a", *latents.split(), probe, *tokens.split(), *own.split()).code == 0
    assert behaviour.requests == [
        GenerateRequest(
            prompt="a",
            sampler={"steps": 3, "guidance_scale": 1.5, "solver": 2, "guidance_start": 0.75, "guidance_end": 0.25,
                     "resamples": 2, "stable_steps": 2, "stable_distance": 0.5,
                     "steering": [{"direction": tensor_from_array([1, 2]), "scale": -2, "start": 1}]},
            sampling={"temperature": 0.5, "top_k": 4, "top_p": 0.25, "repetition_penalty": 1.5, "seed": 9},
            max_new_tokens=5, stop=["x", "y"], ignore_end=True, seed={"base_seed": 1, "sample_id": 2},
            cache_salt="mine", print_special=True,
        )
    ]  # fmt: skip


def test_variables_say_where_the_server_is_and_old_ones_are_named(run: Run, behaviour: Behaviour) -> None:
    env = {"COLASERVE_STEPS": "3", "COLASERVE_STOP": "a b", "COLASERVE_KEY": " secret\n", "COLASERVE_JSON": ""}
    done = run("generate", "a", "--stop", "zz", env=env)
    assert done.out == STORY_TEXT + "\n"
    assert done.err == "colaserve: COLASERVE_STEPS is not read any more: give --steps\n"
    [request], [metadata] = behaviour.requests, behaviour.metadata
    assert (request.sampler.HasField("steps"), list(request.stop)) == (False, ["zz"])
    assert metadata["authorization"] == "Bearer secret"


def test_addresses_keys_and_paths_are_trimmed_and_checked_where_they_are_read(run: Run, server: FakeServer) -> None:
    assert run("info", env={"COLASERVE_TARGET": f" {server.target}\n"}).code == 0
    assert run("info", "--key", "k ").code == 0
    for env, complaint in (
        ({"COLASERVE_KEY": " \n "}, "key: expected printable ASCII"),
        ({"COLASERVE_KEY": "schlüssel"}, "key: expected printable ASCII"),
        ({"COLASERVE_TARGET": " "}, "target: expected"),
        ({"COLASERVE_TLS_CA": " /nowhere.pem\n"}, "--tls-ca: cannot read /nowhere.pem:"),
        ({"COLASERVE_TIMEOUT": "nan"}, "nan is no finite number"),
        ({"COLASERVE_DEBUG": "perhaps"}, "perhaps"),
    ):
        done = run("info", env=env)
        assert (done.code, complaint in done.err, done.err.count("\n")) == (2, True, 1), done.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "a", "--latents"], "--json only"),
        (["generate", "a", "--output", "x"], "--input"),
        (["generate", "a", "--sample-id", "3"], "--seed"),
        (["generate", "a", "--max-new-tokens", "many"], "many"),
        (["generate", "a", "--max-new-tokens", "-1"], "--max-new-tokens: got -1"),
        (["generate", "a", "--max-new-tokens", "0"], "--max-new-tokens: got 0, expected 1 or more"),
        (["infill", "a[[1]]", "--temperature", "-1"], "colaserve: --temperature: got -1, expected 0 to 100"),
        (["generate", "a", "--sampling-seed", "-1"], "colaserve: --sampling-seed: got -1"),
        (["generate", "a", "--target", "nowhere"], "host:port"),
        (["generate", "a", "--tls-ca", "/nowhere.pem"], "--tls-ca: cannot read"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (["generate", "a", "--max-new", "5"], "No such option"),
        (["generate", "-5 degrees"], "a text that begins with - goes behind --"),
        (["generate", "a", "--timeout", "inf"], "inf is no finite number"),
        (["nonsense"], "nonsense"),
        (["infill", "no hole"], "[[8]]"),
        (["infill", f"a [[{'1' * 5000}]]"], "a hole's size has 5000 digits"),
        (["infill"], "TEXT or --file"),
        (["encode"], "one or more texts"),
        (["encode", "a", "--variance"], "--json"),
        (["encode", ""], "texts[0]"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(run: Run, arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.err.startswith("colaserve: ")
    assert done.err.count("\n") == 1
    assert complaint in done.err
    assert done.out == ""


# Latents


def test_latents_go_to_a_file_and_come_back_as_text(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    done = run("encode", "abc", "héllo", "--output", file)
    assert done.code == 0
    assert "3x2" in done.out
    assert list(load_latents(file)) == ["0", "1"]
    assert run("decode", file).out == "0  abc\n1  héllo\n"
    assert run("decode", file, "--name", "1").out == "héllo\n"
    assert run("decode", file, "--name", "1", "--json", "--token-count", "1").json[0]["text"] == "h"
    assert run("decode", file, "--name", "2").code == 2
    variances = run("encode", "abc", "--json", "--variance").json
    assert len(variances[0]["log_variance"]) == 3


def test_latents_of_another_space_are_an_error(run: Run, tmp_path: Path) -> None:
    Latents([[97.0, 0.0]], "f" * 16).save(tmp_path / "other.safetensors")
    done = run("decode", tmp_path / "other.safetensors")
    assert (done.code, SPACE in done.err) == (1, True)
    (tmp_path / "text").write_text("hello")
    assert run("decode", tmp_path / "text").code == 2


def test_interpolate_walks_between_texts_or_files(run: Run, tmp_path: Path) -> None:
    assert run("interpolate", "aaa", "ccc", "--points", "3").out == "0.00  aaa\n0.50  bbb\n1.00  ccc\n"
    files = [tmp_path / "a.safetensors", tmp_path / "c.safetensors"]
    for file, text in zip(files, ("aaa", "ccc"), strict=True):
        run("encode", text, "--output", file)
    missing = run("interpolate", files[0], tmp_path / "none", "--latents")
    assert (missing.code, f"File '{tmp_path / 'none'}' does not exist" in missing.err) == (2, True)
    walk = run("interpolate", *files, "--latents", "--points", "2", "--path", "lerp", "--json").json
    assert [point["text"] for point in walk] == ["aaa", "ccc"]


def test_infill_writes_the_holes(run: Run, behaviour: Behaviour, tmp_path: Path) -> None:
    assert run("infill", "[[2]]a[[1]][[1]] [3]").out == "__a__ [3]\n"
    (tmp_path / "text").write_text("a[[2]]\n")
    reported = run("infill", "--file", tmp_path / "text", "--json", "--seed", "7", "--resamples", "4").json
    assert reported["segments"] == ["a", "__", "\n"]
    assert (behaviour.requests[-1].seed.base_seed, behaviour.requests[-1].sampler.resamples) == (7, 4)


def test_fork_prints_each_branch(run: Run, tmp_path: Path) -> None:
    assert run("fork", "Once", "--branches", "2", "--max-new-tokens", "8").out == "0   there w\n1   there w\n"
    found = run("fork", "Once", "--seed", "7", "--top-logprobs", "1", "--json").json
    assert [branch["finish_reason"] for branch in found] == ["stop"] * 4
    assert found[0]["latents"]["shape"] == [28, 2]
    run("encode", "abcd", "--output", str(tmp_path / "one.safetensors"))
    assert run("fork", "--latents", str(tmp_path / "one.safetensors"), "--max-new-tokens", "4").out.startswith(
        "0   the\n"
    )
    assert "give PROMPT, --file or --latents" in run("fork", "x", "--latents", str(tmp_path / "one.safetensors")).err
    assert "--top-logprobs and --probes are seen with --json only" in run("fork", "x", "--top-logprobs", "1").err


def test_reconstruct_reports_how_faithful_it_is_and_embed_prints_vectors(run: Run) -> None:
    assert "100.0%" in run("reconstruct", "abc").out
    assert run("reconstruct", "abc", "--json").json[0]["token_accuracy"] == 1
    assert "3      2  111 0        'fox'" in run("embed", "fox").out
    assert run("embed", "fox", "--pooling", "per_block", "--json").json[0]["values"] == [[111.0, 0.0]]


def test_logprobs_of_a_text_or_of_latents(run: Run, tmp_path: Path) -> None:
    assert run("logprobs", "ab").out.split() == ["ID", "LOGPROB", "TOKEN", "97", "-0.250", "'a'", "98", "-0.250", "'b'"]
    Latents([[97, 0], [98, 0]]).save(tmp_path / "ab")
    found = run("logprobs", "--latents", tmp_path / "ab", "--id", "7", "--id", "8", "--json").json
    assert (found["text"], found["position_logprobs"]) == ("ab", [[-0.5, -0.5], [-0.5, -0.5]])
    for given in ((), ("ab", "--latents", tmp_path / "ab")):
        assert "give TEXT or --latents, one of them" in run("logprobs", *given).err


def test_score_shows_the_bound_and_takes_its_settings(run: Run, behaviour: Behaviour) -> None:
    assert "log likelihood     -12.500" in run("score", "fox", "--prefix", "a ", "--probes", "4").out
    found = run("score", "fox", "--samples", "0", "--solver", "ab2", "--seed", "7", "--json").json
    assert found["seed"]["base_seed"] == 7
    sent = behaviour.requests[-1]
    assert (sent.samples, sent.HasField("samples"), sent.solver, sent.HasField("steps")) == (0, True, 2, False)


# Look


def test_info_is_text_for_people_and_json_for_machines(run: Run) -> None:
    assert "16 steps of euler, guidance 7" in run("info").out
    assert run("info", "--json").json["space"] == SPACE


def test_status_lists_all_services(run: Run, server: FakeServer) -> None:
    done = run("status", "--wait", "5")
    assert done.code == 0
    for service in ("coordinator", "encoder", "prior", "decoder"):
        assert service in done.out
    assert "1 of 4" in done.out
    assert "512 B of 1 MiB" in done.out
    assert done.out.count("plain: for tests") == 1  # below the table, for all that have it
    assert [row["service"] for row in run("status", "--json").json] == ["coordinator", "encoder", "prior", "decoder"]
    server.health.set("", 2)
    down = run("status")
    assert (down.code, "DOWN" in down.out) == (3, True)
    assert run("status", "--wait", "0.1").code == 3


def test_status_of_a_stage_alone(run: Run) -> None:
    alone = start_server(None, 0, Prior)
    try:
        assert [row["service"] for row in run("status", "--json", "--target", alone.target).json] == ["prior"]
    finally:
        alone.stop()


# Chat


def test_chat_frames_the_first_message_and_then_keeps_a_transcript(run: Run, behaviour: Behaviour) -> None:
    done = run("chat", "--max-new-tokens", "10", stdin="hi\nand then?\n/reset\nhi again\n/exit\n")
    assert done.code == 0
    first, second, third = (request.prompt for request in behaviour.requests if hasattr(request, "prompt"))
    assert first == "Question: hi Answer:"
    assert second == f"User: hi\nAssistant:{STORY_TEXT[:10]}\nUser: and then?\nAssistant:"
    assert third == "Question: hi again Answer:"
    assert done.out.count(STORY_TEXT[:10].strip()) == 3


def test_chat_puts_an_instruction_first_and_ends_with_its_input(run: Run, behaviour: Behaviour) -> None:
    done = run("chat", "--system", "Be brief.", stdin="hi\n/help\n")
    assert done.code == 0
    assert behaviour.requests[-1].prompt == "System: Be brief.\nUser: hi\nAssistant:"
    assert list(behaviour.requests[-1].stop) == ["\nUser:"]
    assert done.err.count("/reset forgets") == 2


@pytest.mark.parametrize(("typing", "code", "errors"), [(False, exits.USAGE, 1), (True, 0, 2)])
def test_chat_ends_with_its_first_error_unless_someone_types(run, monkeypatch, typing, code, errors):
    if typing:
        monkeypatch.setattr(chat, "_interactive", lambda: True)
    done = run("chat", "--max-new-tokens", "0", stdin="hi\nho\n")
    assert (done.code, done.err.count("max-new-tokens: got 0, expected 1 or more")) == (code, errors)
