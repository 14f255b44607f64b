"""``moetrain eval``, ``generate`` and ``suggest`` as a user calls them; numbers held to transformers' own model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain import cli
from moetrain.data.tokenizer import load_tokenizer
from moetrain.evaluate.choices import encode, read_questions, stderr
from moetrain.planner.suggest import step_law, take_tokens
from tests.convert.test_command import a_run

QUESTIONS = [
    {"question": "the model reads", "choices": ["the text", "real", "and the"], "answer": 1},
    {"context": "the text is ", "choices": ["real", "the model and the text"], "answer": "real"},
    {"question": "", "choices": ["the", "and is real"], "answer": 0},
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory of a random model that has no prepared data; 'hf' is its export."""
    monkeypatch.chdir(tmp_path)
    a_run(Path("run"), ["model=tiny", "model.dim=32", "model.n_layers=2"])
    assert cli.main(["convert", "to=hf", "from=run", "out=hf"]) == 0
    Path("tasks.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return Path("run")


def test_choices_are_those_that_transformers_finds_likeliest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["eval", "run", "tasks=tasks.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["tasks.jsonl"]
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained("hf").eval(), load_tokenizer("hf")
    right = right_norm = 0
    for q in QUESTIONS:
        scores = []
        for choice in q["choices"]:  # type: ignore[attr-defined]
            context = str(q.get("question", q.get("context")))
            before, after = encode(tokenizer, context, choice)
            whole = f"{context} {choice}"  # as the harness joins them, whatever the context ends with
            assert tokenizer.tokenizer.decode(before + after) == whole
            with torch.no_grad():
                log_p = theirs(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[len(before) - 1 + i, token]) for i, token in enumerate(after)))
        answer = q["choices"].index(q["answer"]) if isinstance(q["answer"], str) else q["answer"]  # type: ignore[attr-defined]
        lengths = [len(choice) for choice in q["choices"]]  # type: ignore[attr-defined]
        right += max(range(len(scores)), key=scores.__getitem__) == answer
        right_norm += max(range(len(scores)), key=lambda i: scores[i] / lengths[i]) == answer
    assert (found["acc"], found["acc_norm"], found["questions"]) == (right / 3, right_norm / 3, 3)


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Not at the other characters that Unicode counts as ends of lines, which JSON takes as they are."""
    question = {"question": "one\u2028two\x85three", "choices": ["a\u2029", "b"], "answer": 0}
    (tmp_path / "tasks.jsonl").write_bytes((json.dumps(question, ensure_ascii=False) + "\r\n").encode() * 2)
    assert [q.context for q in read_questions(tmp_path / "tasks.jsonl")] == [question["question"]] * 2


def test_the_standard_error_is_that_of_a_mean() -> None:
    answers = torch.tensor([1.0] * 7 + [0.0] * 5, dtype=torch.float64)
    assert stderr(7, 12) == pytest.approx(float(answers.std() / math.sqrt(12)))


def test_generate_prints_the_prompt_and_what_follows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for path, words in (("run", "seed=1"), ("hf", "seed=1"), ("run", "seed=2")):
        capsys.readouterr()
        assert cli.main(["generate", path, "prompt=the model", "max_tokens=12", words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("the model") for text in texts)


def test_a_prompt_begins_as_in_transformers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With BOS, where the tokenizer that came with the weights puts one, which Gemma says nothing sensible without."""
    file = Path("hf/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(single="the $A", special_tokens=[("the", tokenizer.token_to_id("a"))])
    tokenizer.save(str(file))
    ids = AutoTokenizer.from_pretrained("hf")("model", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.token_to_id("a")
    theirs = AutoModelForCausalLM.from_pretrained("hf").eval()
    wanted = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    capsys.readouterr()
    assert cli.main(["generate", "hf", "prompt=model", "max_tokens=8", "temperature=0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(wanted[0].tolist())[1:]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("generate run", "generate needs prompt="),
        ("generate run prompt=a temprature=1", "generate takes no temprature=; did you mean 'temperature'?"),
        ("generate run prompt=a top_p=1.5", "generate: top_p= takes a number from 1e-06 to 1; got '1.5'"),
        ("generate run prompt=a max_tokens=5000", "is longer than the model's max_seq_len=1024"),
        ("generate nowhere prompt=a", "'nowhere': there is no such file or folder"),
        ("eval hf", "'hf' is no run that has held-out text; give data=DIR or tasks=FILE.jsonl"),
        ("eval run", "prepare"),
        ("eval run tasks=none.jsonl", "tasks=none.jsonl: there is no such file"),
        ("eval run tasks=bad.jsonl", "'bad.jsonl' line 2: answer must be the number of a choice, from 0 to 1"),
        ("eval run harness=arc_easy", "harness= needs lm-evaluation-harness, which is not installed: pip install"),
        ("suggest model=tiny", "suggest needs tokens=N once"),
        ("suggest model=tiny tokens=20X", "tokens takes a number of 1 or more, as 20e9 or 20B; got '20X'"),
    ],
)
def test_wrong_words_are_one_line(run: Path, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps(QUESTIONS[1])
    Path("bad.jsonl").write_text(good + "\n" + good.replace('"answer": "real"', '"answer": 2') + "\n")
    capsys.readouterr()
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("moetrain: error: ") and err.count("\n") == 1 and not out


def test_step_law_for_a_model_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """N of model=tiny: attention, norms, router and 8 experts of 4 layers, and the last norm. The law by logarithms."""
    layer = 192 * 32 * (6 + 2 + 2 + 6) + 2 * 32 + 2 * 192 + 8 * 192 + 8 * 3 * 192 * 256
    n = 4 * layer + 192
    assert cli.main(["suggest", "model=tiny", "tokens=2B", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == n
    assert math.log(found["lr"]) == pytest.approx(math.log(1.79) - 0.713 * math.log(n) + 0.307 * math.log(2e9))
    assert math.log(found["batch_tokens"]) == pytest.approx(math.log(0.58) + 0.571 * math.log(2e9))
    assert abs(found["global_batch"] * 128 - found["batch_tokens"]) <= 2 * 128
    assert any("size" in what for what in found["beyond"])
    assert take_tokens(["tokens=1.5e3k", "a=b"]) == (1.5e6, ["a=b"])
    # a dense model of the paper's range: an order of magnitude that its figures show
    lr, batch = step_law(1.07e9, 100e9)
    assert 1e-3 < lr < 2.5e-3 and 1e6 < batch < 1.2e6


def test_the_harness_gets_the_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package loads what it is given with transformers, as the real one does."""
    stand_in = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
arguments = dict(word.split("=") for word in words["--model_args"].split(","))
model = AutoModelForCausalLM.from_pretrained(arguments["pretrained"])
AutoTokenizer.from_pretrained(arguments["pretrained"])
open("seen.txt", "w").write(f"{words['--model']} {words['--tasks']} {model.config.hidden_size}")
"""
    Path("lm_eval").mkdir()
    Path("lm_eval/__init__.py").touch()
    Path("lm_eval/__main__.py").write_text(stand_in)
    monkeypatch.syspath_prepend(".")
    assert cli.main(["eval", "run", "harness=arc_easy,piqa"]) == 0
    assert Path("seen.txt").read_text() == "hf arc_easy,piqa 32"
