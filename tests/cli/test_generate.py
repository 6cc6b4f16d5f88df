import functools
import json
import urllib.request

import pytest
import torch

import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations import energy
from qwen3_vl_memory_optimizations.figures.figures import MemoryFigures
from qwen3_vl_memory_optimizations.monitoring import AlertLimits

FIGURES = {
    "question",
    "estimated_first_token_s",
    "answer",
    "interrupted",
    "prompt_tokens",
    "notes",
    "new_tokens",
    "time_to_first_token_s",
    "tokens_per_s",
    "peak_rss_bytes",
    "bytes_read_per_token",
    "hit_rate",
    "cpu_s_per_token",
    "joules_per_token",
    "over_budget_bytes",
    "alerts",
}


@pytest.fixture
def digits(tiny, demo_images):
    return ["generate", tiny, "--image", demo_images / "digits_0.png", "--prompt", "read the digits."]


@pytest.fixture(scope="session")
def expected_digits(demo_images):
    questions = json.loads((demo_images / "questions.json").read_text())
    return next(row["expected"] for row in questions if row["image"] == "digits_0.png")


def test_the_answer_is_all_there_is_on_stdout(run, digits, expected_digits):
    result = run(*digits, "--tensor-budget", "2MB")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == expected_digits
    assert "tokens" not in result.stdout
    quiet = run(*digits, "--tensor-budget", "2MB", "--quiet")
    assert quiet.stdout == result.stdout and quiet.stderr == ""


def test_an_alert_never_interrupts_the_answer_and_is_among_the_stats(run, digits, expected_digits, monkeypatch):
    made = functools.partial(AlertLimits, hold_s=0.0, memory=0.0, memory_clear=0.0)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.monitoring.alerts.AlertLimits", made)
    result = run(*digits, "--tensor-budget", "2MB", "--stats")
    assert result.stdout.strip() == expected_digits
    lines = result.stderr.splitlines()
    [alert] = [line for line in lines if "memory fires" in line]
    assert alert.startswith("alert: memory fires: ") and lines.index(alert) > lines.index(
        next(line for line in lines if "first token after" in line)
    ), "after the figures"
    assert "fires" not in run(*digits, "--tensor-budget", "2MB").stderr
    assert json.loads(run(*digits, "--tensor-budget", "2MB", "--json").stdout)["alerts"] == [
        alert.removeprefix("alert: ")
    ]


def test_a_breach_of_the_budget_is_said_at_the_end(run, digits, monkeypatch):
    monkeypatch.setattr(MemoryFigures, "peak_bytes", lambda self: 4_140_000_000)
    result = run(*digits, "--ram-budget", "4GB", "--stats")
    assert result.stderr.splitlines()[-1] == "peak 4.14 GB, over the budget of 4.00 GB by 0.14 GB"
    assert result.stderr.count("over the budget") == 1
    assert json.loads(run(*digits, "--ram-budget", "4GB", "--json").stdout)["over_budget_bytes"] == 140_000_000


def test_stats_go_to_stderr(run, digits, expected_digits):
    result = run(*digits, "--stats")
    assert result.stdout.strip() == expected_digits
    for words in (
        "17 tokens",
        "tokens/s",
        "first token after",
        "peak memory",
        "SSD reads per token",
        "hit rate",
        "CPU s per token",
    ):
        assert words in result.stderr


def test_json_has_the_answer_and_its_cost(run, digits, expected_digits):
    # Private: other tests asked about this image, and what is known of it is not read.
    result = run(*digits, "--json", "--stats", "--tensor-budget", "1.5MB", "--private")
    answer = json.loads(result.stdout)
    assert set(answer) == FIGURES | {"memory"}
    assert answer["answer"] == expected_digits
    assert not answer["interrupted"]
    assert answer["new_tokens"] == 17
    assert answer["tokens_per_s"] > 0
    assert answer["bytes_read_per_token"] > 0
    assert 0 <= answer["hit_rate"] <= 1
    assert answer["cpu_s_per_token"] > 0
    assert answer["memory"]["budget"]["tensor_budget_bytes"] == 1_500_000


def test_energy_is_told_where_the_machine_counts_it(run, digits, monkeypatch, tmp_path):
    package = tmp_path / "sys/class/powercap/intel-rapl:0"
    package.mkdir(parents=True)
    (package / "name").write_text("package-0\n")
    (package / "max_energy_range_uj").write_text("262143328850\n")
    (package / "energy_uj").write_text("1000000\n")

    class Here(energy.EnergyMeter):
        def __init__(self) -> None:
            super().__init__(root=tmp_path)

        def read(self) -> float | None:
            taken_uj = int((package / "energy_uj").read_text()) + 6_000_000
            (package / "energy_uj").write_text(f"{taken_uj}\n")
            return super().read()

    monkeypatch.setattr(energy, "EnergyMeter", Here)
    answer = json.loads(run(*digits, "--json", "--max-new-tokens", 3).stdout)
    assert answer["joules_per_token"] == 2.0
    assert "2 J per token" in run(*digits, "--stats", "--max-new-tokens", 3).stderr


def test_a_profile_gives_what_no_option_does(run, digits, tmp_path):
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'why = "a test"\n[match]\n[memory_config]\ntensor_budget = "3MB"\ncodec = "int8"\nprivate = true\n'
    )
    answer = json.loads(run(*digits, "--json", "--stats", "--profile", profile, "--tensor-budget", "2MB").stdout)
    assert answer["memory"]["budget"]["tensor_budget_bytes"] == 2_000_000
    answer = json.loads(run(*digits, "--json", "--stats", "--profile", profile).stdout)
    assert answer["memory"]["budget"]["tensor_budget_bytes"] == 3_000_000
    assert answer["memory"]["cache"]["levels"]["ssd"] is None, "private"


def test_max_new_tokens_ends_the_answer(run, digits):
    assert json.loads(run(*digits, "--json", "--max-new-tokens", 3).stdout)["new_tokens"] == 3


def test_prompt_lookup_gives_the_same_answer(run, digits, expected_digits):
    result = run(*digits, "--prompt-lookup", 3)
    assert result.stdout.strip() == expected_digits, result.stderr


def test_an_assistant_gives_the_same_answer(run, digits, tiny, expected_digits):
    result = run(*digits, "--assistant", tiny, "--tensor-budget", "2MB", "--json", "--stats")
    answer = json.loads(result.stdout)
    assert answer["answer"] == expected_digits
    assert answer["memory"]["kinds"]["weights"]["tensors"] % 2 == 0, "two models"
    assert answer["new_tokens"] == 17
    assert answer["tokens_per_s"] is None, "all of them were right, and came at once"


def test_two_sources_of_drafts_are_a_mistake(run, digits, tiny):
    result = run(*digits, "--assistant", tiny, "--prompt-lookup", 3)
    assert result.exit_code == 2
    assert "use only one of them" in result.stderr


def test_a_temperature_draws_tokens(run, digits):
    torch.manual_seed(0)
    drawn = run(*digits, "--temperature", 5, "--max-new-tokens", 12).stdout
    assert drawn != run(*digits, "--max-new-tokens", 12).stdout


def test_a_video_of_frames_is_answered(run, tiny, demo_images, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes((demo_images / "vqa_0.png").read_bytes())
    result = run("generate", tiny, "--video", tmp_path, "-p", "what color is the shape?", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_said(run, digits, monkeypatch, as_json):
    create = qwen3_vl_memory_optimizations.create_optimized_model
    closed = []

    def create_interrupted(*args, **kwargs):
        model = create(*args, **kwargs)
        optimizer, close = model.memory_optimizer, model.memory_optimizer.close

        def generate(*, input_ids, streamer, **kwargs):
            streamer.put(input_ids)
            for token in input_ids[0, -4:-2]:
                streamer.put(token[None])
            raise KeyboardInterrupt

        monkeypatch.setattr(model, "generate", generate)
        monkeypatch.setattr(optimizer, "close", lambda: (closed.append(True), close()))
        return model

    monkeypatch.setattr(qwen3_vl_memory_optimizations, "create_optimized_model", create_interrupted, raising=False)
    result = run(*digits, *(["--json"] if as_json else []))
    assert result.exit_code == 130
    assert closed
    if as_json:
        answer = json.loads(result.stdout)
        assert answer["interrupted"]
        assert answer["new_tokens"] == 2
    else:
        assert "Traceback" not in result.stderr
        assert result.stderr.endswith("stopped\n")


def test_figures_are_served_while_it_runs_and_no_longer(run, digits, monkeypatch):
    from qwen3_vl_memory_optimizations.monitoring import MetricsExporter

    scraped, close = [], MetricsExporter.close

    def read_and_close(exporter):
        scraped.append(urllib.request.urlopen(exporter.url, timeout=10).read().decode())
        close(exporter)

    monkeypatch.setattr(MetricsExporter, "close", read_and_close)
    result = run(*digits, "--metrics", "0", "--json", "--private")
    assert json.loads(result.stdout)["new_tokens"] == 17
    url = result.stderr.split("metrics: ")[1].strip()
    assert "qwen3vl_mem_tokens_total 17.0" in scraped[0]
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)


def test_a_seed_makes_sampling_repeatable(run, digits):
    def answer(seed):
        result = run(
            *digits, "--temperature", "3", "--top-p", "0.99", "--seed", seed, "--json", "--max-new-tokens", "12"
        )
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["answer"]

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in (1, 2, 3)}) > 1


def test_top_p_without_sampling_is_refused(run, digits):
    result = run(*digits, "--top-p", "0.9")
    assert result.exit_code == 2
    assert "--top-p has no effect on greedy decoding; set --temperature" in result.stderr
