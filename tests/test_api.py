"""`graft.train`, `graft.evaluate` and `graft.resume`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft
from graft.config_file import check_config, load_config
from graft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    GraderError,
    ModelError,
    ResourceError,
)
from graft.report.metrics import without_wall_clock
from graft.report.run_folder import RunFolder
from graft.runs import start_run
from graft.update import step

ROWS = [{"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(12)]

SMALL = {
    "sampling__max_new_tokens": 6,
    "algorithm__group_size": 2,
    "training": {"prompts_per_step": 2, "steps": 2},
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny model; the test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return str(tiny_model_folder)


def by_length(completion, item):
    return float(len(completion) % 2)


def by_characters(completion, item):
    return float(sum(map(ord, completion)) % 7)


def test_the_public_names():
    assert graft.__all__ == ["GraftError", "Interrupted", "__version__", "evaluate", "resume", "train"]
    for name in graft.__all__:
        assert getattr(graft, name) is not None
    assert set(graft.__all__) <= set(dir(graft))
    assert callable(graft.evaluate)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = graft.trian  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_graft_imports_nothing_heavy_and_guards_first():
    code = (
        "import sys, graft\n"
        "assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules), 'heavy'\n"
        "graft.train, graft.evaluate, graft.GraftError, graft.__version__\n"
        "import graft.runs, graft.pull\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_functions_stay_functions_when_all_modules_are_loaded(model):
    import graft.loop

    assert callable(graft.train)
    assert callable(graft.evaluate)
    assert callable(graft.resume)


def test_train_with_a_closure_on_rows_in_memory(model):
    seen = []

    def reward(completion, item, sample):
        seen.append((item["answer"], sample.tokens))
        return sample.tokens / 6

    run = graft.train(model, ROWS, reward, data={"held_out": 4}, **SMALL)
    assert run.path == Path("runs/run")
    assert run.summary["status"] == "finished"
    assert (run.summary["training_rows"], run.summary["held_out_rows"]) == (8, 4)
    assert len(seen) == 4 + 2 * 2 * 2 + 4  # before, two steps, after
    assert run.export("out").joinpath("model.safetensors").is_file()

    second = graft.train(model, ROWS, lambda completion, item: 1.0, **SMALL)
    assert second.path == Path("runs/run-2")


def test_without_steps_it_is_one_epoch(model):
    run = graft.train(model, ROWS, by_length, **{**SMALL, "training": {"prompts_per_step": 5}})
    assert run.summary["steps"] == 3  # 12 rows
    again = graft.train(model, ROWS[:4], by_length, **{**SMALL, "training": {}})
    assert again.summary["steps"] == 1


def test_rows_from_a_file_and_a_grader_by_settings(model):
    lines = [f'{{"prompt": "What is {n} + 1?", "sum": {n + 1}}}' for n in range(6)]
    Path("rows.jsonl").write_text("\n".join(lines))
    run = graft.train(model, "rows.jsonl", {"type": "number", "key": "sum"}, run="first", **SMALL)
    assert run.path == Path("first")
    config = load_config(run.path / "config.toml")
    assert config.grader is not None
    assert (config.data.source, config.grader["key"]) == ("rows.jsonl", "sum")


def test_a_generator_of_rows_and_a_reward_by_name(model):
    Path("grader.py").write_text("def reward(completion, item):\n    return len(completion)\n")
    run = graft.train(model, (row for row in ROWS), "grader.py:reward", **SMALL)
    assert run.summary["training_rows"] == 12


def test_sft_needs_no_reward(model):
    rows = [{**row, "worked": str(row["answer"])} for row in ROWS]
    run = graft.train(
        model,
        rows,
        algorithm={"name": "sft", "worked": "key:worked"},
        training={"steps": 1, "prompts_per_step": 4},
    )
    assert run.summary["algorithm"] == "sft"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainng": {"steps": 1}}, "graft.train: trainng: unknown setting. Did you mean 'training'?"),
        ({"training__stpes": 1}, "graft.train: training.stpes: unknown setting. Did you mean 'steps'?"),
        ({"training": {"steps": 1, "epochs": 1}}, "give one of training.steps, training.epochs"),
        ({"seed": 1, "seed__x": 2}, "seed__x: 'seed' is a value, not a section"),
        ({"algorithm": "grppo"}, "no algorithm is called 'grppo'. Did you mean 'grpo'?"),
        ({"training": 5}, "training = 5"),
        ({"optimizer__learning_rate": "fast"}, 'optimizer.learning_rate = "fast"'),
    ],
)
def test_wrong_settings_are_refused_as_in_a_file(model, settings, message):
    with pytest.raises(ConfigError) as refused:
        graft.train(model, ROWS, by_length, **settings)
    assert message in str(refused.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("rows", "reward", "kind", "message"),
    [
        ({"prompt": "x"}, by_length, ConfigError, "rows: got a dict; want a list of dicts"),
        (7, by_length, ConfigError, "rows: got a int"),
        (["x"], by_length, DataError, "a mapping"),
        ([{"text": "x"}], by_length, DataError, "the prompt column 'prompt'"),
        ([], by_length, DataError, "no rows"),
        (ROWS, 7, ConfigError, "reward: got a int"),
        (ROWS, None, ConfigError, "needs a [grader] section"),
        (ROWS, "nubmer", ConfigError, "grader.type: got \"nubmer\"; wants a type. Did you mean 'number'?"),
        (ROWS, lambda: 1.0, GraderError, "want function(completion, item)"),
    ],
)
def test_wrong_rows_and_rewards(model, rows, reward, kind, message):
    with pytest.raises(kind) as refused:
        graft.train(model, rows, reward, **SMALL)
    assert message in str(refused.value)


def test_a_taken_folder_and_a_missing_model(model):
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        graft.train("nonesuch", ROWS, by_length, run="taken")
    with pytest.raises(ModelError, match="unknown model"):
        graft.train("nonesuch", ROWS, by_length)
    assert issubclass(ModelError, graft.GraftError)


def test_resume_of_a_run_that_failed_half_way(model):
    calls = []

    def breaks(completion, item):
        calls.append(item)
        if len(calls) > 6:
            raise OSError("the judge is gone")
        return float(len(completion) % 2)

    with pytest.raises(GraderError, match="the judge is gone"):
        graft.train(model, ROWS, breaks, run="broken", checkpoints={"every": 1}, **SMALL)
    assert RunFolder.open("broken").read_summary()["status"] == "failed"
    with pytest.raises(ConfigError, match=r"from Python, reward=function"):
        graft.resume("broken", rows=ROWS)
    with pytest.raises(ConfigError, match=r"data\.source: missing"):
        graft.resume("broken", reward=by_length)
    run = graft.resume("broken", rows=ROWS, reward=by_length)
    steps = [r["step"] for r in RunFolder.open("broken").read_metrics() if r["stage"] == "train"]
    assert (run.summary["status"], steps) == ("finished", [1, 2])


def test_an_error_keeps_the_steps_before_it(model):
    """Without `checkpoints.every`: the grader fails in the second step, and resuming does not make the first again."""
    graded = []

    def breaks(completion, item):
        graded.append(completion)
        if len(graded) == 7:
            raise OSError("the judge is gone")
        return float(len(completion) % 2)

    undisturbed = graft.train(
        model, ROWS, lambda completion, item: float(len(completion) % 2), run="whole", **SMALL
    )
    with pytest.raises(GraderError, match="the judge is gone"):
        graft.train(model, ROWS, breaks, run="broken", **SMALL)
    assert [p.name for p in Path("broken/checkpoints").iterdir()] == ["step-000001"]
    run = graft.resume("broken", rows=ROWS, reward=breaks)
    assert len(graded) == 4 + 4 + 4
    one, other = (
        [without_wall_clock(r) for r in RunFolder.open(each.path).read_metrics()]
        for each in (undisturbed, run)
    )
    assert one == other


def test_an_error_before_the_first_step_writes_no_checkpoint(model):
    def breaks(completion, item):
        raise OSError("the judge is gone")

    with pytest.raises(GraderError):
        graft.train(model, ROWS, breaks, run="broken", **SMALL)
    assert not Path("broken/checkpoints").exists()


def test_an_error_in_the_midst_of_a_step_writes_no_checkpoint(model, monkeypatch):
    """Two updates a step, and no memory for the fourth: the weights are those of no step."""
    made = []

    def optimise(*args, **kwargs):
        made.append(1)
        if len(made) == 4:
            raise MemoryError
        return step.optimise(*args, **kwargs)

    monkeypatch.setattr("graft.trainer.optimise", optimise)
    with pytest.raises(ResourceError):
        graft.train(model, ROWS, by_length, run="broken", algorithm__updates_per_batch=2, **SMALL)
    assert len(made) == 4
    assert not Path("broken/checkpoints").exists()


def test_a_run_that_diverges_keeps_its_checkpoint_and_comes_to_the_same_place_again(model):
    settings = {**SMALL, "training": {"prompts_per_step": 4, "steps": 6}, "algorithm__group_size": 4}
    with pytest.raises(DivergenceError, match=r"training step \d|after \d steps"):
        graft.train(
            model,
            ROWS,
            by_characters,
            run="diverged",
            **{**settings, "optimizer": {"learning_rate": 1e25}},
            checkpoints__every=1,
        )
    folder = RunFolder.open("diverged")
    summary = folder.read_summary()
    assert summary["status"] == "failed"
    assert "optimizer.learning_rate" in summary["error"]
    [kept] = (folder.path / "checkpoints").glob("step-*")
    done = [record["step"] for record in folder.read_metrics()]
    assert kept.name == f"step-{done[-1]:06d}"
    with pytest.raises(DivergenceError, match=r"training step \d|after \d steps"):
        graft.resume("diverged", rows=ROWS, reward=by_characters)
    assert [record["step"] for record in folder.read_metrics()] == done


def test_evaluate_a_model_a_run_and_its_folder(model):
    base = graft.evaluate(model, ROWS, by_length, samples=2, sampling__max_new_tokens=6)
    assert (base.rows, len(base.trees)) == (12, 12)
    assert set(base.pass_at) == {1, 2}
    run = graft.train(model, ROWS, by_length, run="first", **SMALL)
    of_run = graft.evaluate(run, ROWS, by_length, sampling__max_new_tokens=6)
    of_folder = graft.evaluate("first", ROWS, by_length, sampling__max_new_tokens=6)
    exported = graft.evaluate(run.export("out"), ROWS, by_length, sampling__max_new_tokens=6)
    assert of_run.accuracy == of_folder.accuracy == exported.accuracy
    texts = [[tree.nodes[1].tokens.tolist() for tree in e.trees] for e in (of_run, of_folder, exported, base)]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_evaluate_measures_the_rows_that_train_holds_out(model):
    run = graft.train(model, ROWS, by_length, run="first", data={"held_out": 4}, **SMALL)
    measured = graft.evaluate(
        model, ROWS, by_length, data={"held_out": 4}, sampling__max_new_tokens=6, algorithm__group_size=2
    )
    assert measured.rows == 4
    assert measured.accuracy.mean == run.summary["held_out_before"]


def test_evaluate_refusals(model):
    with pytest.raises(ConfigError, match="reward is missing"):
        graft.evaluate(model, ROWS)
    with pytest.raises(ConfigError, match="samples = 0"):
        graft.evaluate(model, ROWS, by_length, samples=0)
    Path("empty").mkdir()
    Path("empty/metrics.jsonl").touch()
    with pytest.raises(DataError, match="not a run folder"):
        graft.evaluate("empty", ROWS, by_length)
    run = graft.train(model, ROWS, by_length, run="first", **SMALL)
    for path in (run.path / "checkpoints").glob("step-*"):
        path.rename(path.with_name("gone"))
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        graft.evaluate(run, ROWS, by_length)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.05}], ids=str)
def test_training_under_truncated_sampling(model, filters):
    """The engine agrees with the trainer; with an anchor and two updates a batch, all forward passes know the sets."""
    run = graft.train(
        model,
        ROWS,
        by_characters,
        **{**SMALL, "sampling": {"max_new_tokens": 6, **filters}},
        algorithm={"group_size": 4, "updates_per_batch": 2, "kl": {"coefficient": 0.1}},
        model__precision="exact",
    )
    records = [r for r in RunFolder.open(run.path).read_metrics() if r["stage"] == "train"]
    trees = list(RunFolder.open(run.path).read_trees())
    assert all("kept" in node for tree in trees for node in tree["nodes"][1:])
    assert [record["groups_with_signal"] > 0 for record in records] == [True, True]
    assert all(record["engine_gap_max"] < 1e-3 for record in records)


def test_quiet_prints_nothing(model, capfd):
    run = graft.train(model, ROWS, by_characters, run="silent", quiet=True, data={"held_out": 4}, **SMALL)
    graft.evaluate(run, ROWS, by_characters, quiet=True, sampling__max_new_tokens=6)
    graft.resume(run.path, rows=ROWS, reward=by_characters, quiet=True)
    run.generate(["What is 1 + 1?"])
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    graft.resume(run.path, rows=ROWS, reward=by_characters)
    said = capfd.readouterr()
    assert said.out == ""
    assert "report: silent/report.html" in said.err


def test_the_trained_policy_answers_as_it_was_asked_in_training(model):
    settings = {**SMALL, "data": {"suffix": " Now!", "system": "Be brief."}}
    run = graft.train(model, ROWS, by_characters, **settings)
    questions = ["What is 1 + 1?", "What is 2 + 5?"]
    answers = run.generate(questions, top_k=1, max_new_tokens=5)
    folder = str(run.export("out"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question, answer in zip(questions, answers, strict=True):
        conversation = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{question} Now!"},
        ]
        asked = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        ids = asked["input_ids"]
        for _ in range(5):  # the most likely token, a whole forward pass each
            ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in (0, 2):
                break
        new = ids[0, asked["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)


def test_generate_draws_by_its_seed_and_takes_rows_and_messages(model):
    run = graft.train(model, ROWS, by_characters, quiet=True, **SMALL)
    asked = ["What is 1 + 1?", {"prompt": "What is 1 + 1?"}, [{"role": "user", "content": "What is 1 + 1?"}]]
    first = run.generate(asked)
    assert first == run.generate(asked)
    assert first != run.generate(asked, seed=1)
    assert len(set(first)) == 3  # each has a random stream of its own
    assert len(set(run.generate(asked, top_k=1))) == 1
    with pytest.raises(ConfigError, match=r"Run\.generate: sampling\.temperature = 0"):
        run.generate(asked, temperature=0)
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens: unknown setting"):
        run.generate(asked, max_tokens=3)
    with pytest.raises(ConfigError, match="want a list of prompts"):
        run.generate("What is 1 + 1?")
    with pytest.raises(DataError, match="no prompt of at most 1024"):
        run.generate(["What? " * 2000])


def test_a_run_without_a_reward_generates_too(model):
    rows = [{**row, "worked": str(row["answer"])} for row in ROWS]
    algorithm = {"name": "sft", "worked": "key:worked"}
    run = graft.train(model, rows, algorithm=algorithm, training={"steps": 1}, quiet=True)
    assert [type(text) for text in run.generate(["Hello", "Hello"], max_new_tokens=3)] == [str, str]


def test_an_interruption_carries_the_run(model, capfd):
    calls = []

    def stops(completion, item):
        calls.append(item)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return float(len(calls) % 2)

    with pytest.raises(graft.Interrupted) as stopped:
        graft.train(model, ROWS, stops, run="stopped", quiet=True, **{**SMALL, "training__steps": 9})
    run = stopped.value.run
    assert run.path == Path("stopped")
    assert run.summary["status"] == "interrupted"
    assert len(run.generate(["What is 1 + 1?"])) == 1
    assert "graft.resume('stopped')" in stopped.value.__notes__[0]
    finished = graft.resume(run.path, rows=ROWS, reward=stops, quiet=True)
    assert finished.summary["status"] == "finished"
    assert capfd.readouterr() == ("", "")


def test_a_taken_folder_is_refused_before_anything_is_read(model):
    Path("taken/checkpoints").mkdir(parents=True)
    config = check_config(
        {
            "run": "taken",
            "model": {"name": "nonesuch"},
            "data": {"source": "none.jsonl"},
            "training": {"steps": 1},
        },
        where="test",
    )
    with pytest.raises(ConfigError, match="already holds a run"):
        start_run(config)


def test_a_row_that_comes_twice_in_a_step_gets_other_samples(model):
    """Fewer rows than a step has prompts: with equal random numbers half of the batch would be copies."""
    run = graft.train(
        model,
        ROWS[:1],
        lambda completion, item: float(len(completion) % 2),
        quiet=True,
        algorithm={"name": "grpo", "group_size": 2},
        training={"steps": 2, "prompts_per_step": 3},
        sampling={"max_new_tokens": 8},
    )
    drawn = [
        tuple(node["tokens"])
        for tree in map(json.loads, (run.path / "trees.jsonl").read_text().splitlines())
        if tree["stage"] == "train"
        for node in tree["nodes"][1:]
    ]
    assert len(drawn) == len(set(drawn)) == 2 * 3 * 2


def test_kl_is_measured_where_no_group_has_signal(model):
    run = graft.train(
        model,
        ROWS,
        lambda completion, item: 1.0,
        quiet=True,
        algorithm={"name": "grpo", "group_size": 2},
        training={"steps": 1, "prompts_per_step": 2},
        sampling={"max_new_tokens": 4},
        report={"kl_every": 1},
    )
    [step] = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert step["tokens_trained"] == 0
    assert step["kl_to_initial"] == 0.0


def test_a_batch_that_stays_short_is_told(model, capfd):
    graft.train(
        model,
        ROWS,
        lambda completion, item: 1.0,
        algorithm={"name": "dapo", "group_size": 2, "max_sampling_rounds": 2},
        training={"steps": 1, "prompts_per_step": 2},
        sampling={"max_new_tokens": 4},
    )
    said = " ".join(capfd.readouterr().err.split())
    assert "step 1: 0 of 2 groups have signal after 2 rounds of sampling; it trains on 2" in said
