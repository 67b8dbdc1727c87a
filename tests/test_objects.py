"""What shows itself: one line as `repr`, all of it in print, tables that escape; and what an editor and `help` see."""

import ast
import inspect
import re
from html.parser import HTMLParser

import pytest
import yaml
from IPython.lib.pretty import pretty
from repository import PACKAGE, ROOT

import qlora_nb
from qlora_nb import (
    add_lora,
    check_dataset,
    diagnose,
    estimate_memory,
    evaluate,
    load_model,
    load_run,
    load_sft_dataset,
)
from qlora_nb.core import UserError, profile
from qlora_nb.memory import draw_memory_bar, estimate_generation
from qlora_nb.plan import plan_training, write_settings_file
from qlora_nb.recommendation import recommend
from qlora_nb.report import compare
from qlora_nb.run import Settings, copy_embedded_run, read_own_config, resolve_settings, settings_of_part
from qlora_nb.workflow import draw_loss_curve, group_settings, split_plan

LLAMA = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "model_type": "llama",
    "max_position_embeddings": 131072, "head_dim": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "An object of each kind."
    run = load_run(copy_embedded_run(tmp_path_factory.mktemp("<b>")))
    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=False)
    half = lambda reply, expected, row: 0.5  # noqa: E731
    half.__name__ = "<b>&"
    return {
        "Profile": profile("t4"),
        "MemoryEstimate": estimate_memory(LLAMA, card=16 * 2**30),
        "Plan": plan_training(LLAMA, "L4", [300] * 50),
        "Recommendation": recommend(LLAMA, 1000, "T4"),
        "Run": run,
        "Diagnosis": diagnose(run),
        "DatasetReport": check_dataset(load_sft_dataset(limit=40), tokenizer, 120),
        "CodeReport": qlora_nb.explain_old_code("SFTTrainer(tokenizer='<b>&')"),
        "Comparison": compare([run, run]),
        "Evaluation": evaluate(model, tokenizer, load_sft_dataset(limit=3), scorer=half, max_new_tokens=4),
    }


class Tags(HTMLParser):
    "Raises where a tag is closed that isn't the open one; `cells` are the texts of a table's."

    def __init__(self):
        super().__init__()
        self.open, self.cells = [], []

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_repr_is_one_short_line_and_print_has_all(shown):
    for name, found in shown.items():
        line = repr(found)
        assert line.startswith(f"<{name}: ") and line.endswith(">") and "\n" not in line and len(line) < 200, line
        assert pretty(found) == str(found) and "\n" in str(found), "a terminal shows the whole text"
        assert pretty([found]) == f"[{line}]", "in a list, the line"


def test_the_html_is_well_formed_and_escaped(shown):
    for name, found in shown.items():
        tags = Tags()
        tags.feed(found._repr_html_())
        assert not tags.open, f"{name}: {tags.open} stay open"
        assert "/tmp" not in found._repr_html_(), f"{name} shows a path of the machine"
    for name in ("CodeReport", "Evaluation"):
        assert "<b>&" not in shown[name]._repr_html_() and "&lt;b&gt;&amp;" in shown[name]._repr_html_()
    title = shown["Run"]
    title.path = title.path.parent / "<i>mine"
    assert "<i>" not in title._repr_html_() and "&lt;i&gt;mine" in title._repr_html_()


def test_an_evaluation_is_a_table_of_its_figures(shown):
    "Each with its interval, as the text has them; the rows behind them agree."
    found, tags = shown["Evaluation"], Tags()
    tags.feed(found._repr_html_())
    table = [tuple(tags.cells[i : i + 2]) for i in range(0, len(tags.cells), 2)]
    assert table[0] == ("3 held-out rows", "measured (95 %)")
    losses = [row["loss"] for row in found.rows]
    tokens = [row["tokens"] for row in found.rows]
    loss = sum(value * count for value, count in zip(losses, tokens)) / sum(tokens)
    wanted = {
        "held-out loss": f"{loss:#.3g}",
        "score (<b>&)": "0.500",
        "stops by itself, limit too short": "0.0 %",
        "tokens a reply": "4.00",
    }
    figures = {title: text.partition(" (") for title, text in table[1:]}
    assert list(figures) == ["held-out loss", "its perplexity", "score (<b>&)", "<think> form", *list(wanted)[2:]]
    assert {title: figures[title][0] for title in wanted} == wanted
    assert all(interval.endswith(")") and "–" in interval for _, _, interval in figures.values())
    assert [tuple(re.split("  +", line, maxsplit=1)) for line in str(found).splitlines()] == table


def test_pictures_have_the_colours_of_the_page(shown):
    "Text and lines are drawn in `currentColor`: black would vanish on a dark page."
    for picture in (draw_loss_curve(shown["Run"].metrics, 3.4, 0.02), draw_memory_bar({"a": 1.0}, {"b": 2.0})):
        assert "fill: currentColor" in picture and not re.search(r"black|#000\b|#fff\b|white", picture)
    assert draw_loss_curve([]) == "" and "nan" not in draw_loss_curve(
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.0}, {"step": 3, "loss": 0.0}], float("inf"), None
    )


def test_the_bar_adds_up(shown):
    estimate = shown["MemoryEstimate"]
    widths = [float(w) for w in re.findall(r'y="20" width="([\d.]+)"', draw_memory_bar(estimate.by_component, {}))]
    assert sum(widths) == pytest.approx(600, abs=1) and len(widths) == sum(
        v > 0 for v in estimate.by_component.values()
    )


# --- answering ------------------------------------------------------------------------------------------------------


def test_the_estimate_of_answering():
    one = estimate_generation(LLAMA, batch_size=64, prompt_length=512, max_new_tokens=512)
    assert one.by_component["dense_copy"] == 2 * 28 * (3072 * 3072 * 2 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    assert one.by_component["kv_cache"] == 64 * 1024 * 28 * 2 * 8 * 128 * 2
    assert estimate_generation(LLAMA, "lora").by_component["dense_copy"] == 0, "16-bit weights are dense already"
    assert estimate_generation(LLAMA, batch_size=1, max_new_tokens=1).total_bytes < one.total_bytes
    for wrong in ({"method": "full"}, {"batch_size": 0}, {"max_new_tokens": 0}, {"prompt_length": True}):
        with pytest.raises(UserError):
            estimate_generation(LLAMA, **wrong)


def test_a_plan_answers_within_its_card():
    for gigabytes in (6, 8, 12, 24, 80):
        plan = plan_training(LLAMA, f"{gigabytes} GB", [300] * 500, method="qlora")
        one = plan.answering
        assert one.total_bytes <= plan.budget and f"for {one.settings['batch_size']} prompts" in str(plan)
        assert ("with a dense copy" in str(plan)) == one.settings["dense"] == plan.to_dict()["answering"]["dense"]
    assert one.settings["dense"], "on 80 GB there is room for a copy"
    none = plan_training(LLAMA, "2 GB")
    assert none.answering is None is none.to_dict()["answering"] and "answering" not in str(none)


# --- settings files -------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_train_takes(shown, tmp_path):
    for name in ("Plan", "Recommendation"):
        file = shown[name].to_config(tmp_path / "new" / f"{name}.yaml", model="me/m", data="mine.jsonl", limit=None)
        config = read_own_config(file)
        assert config.pop("model") == "me/m" and config.pop("data") == "mine.jsonl" and "limit" not in config
        settings = resolve_settings(config=config)
        wanted = {key: value for part in shown[name].settings.values() for key, value in part.items()}
        assert {key: getattr(settings, key) for key in wanted} == wanted and set(config) == set(wanted)


def test_reasons_stay_comments(tmp_path):
    file = write_settings_file(
        tmp_path / "a.yaml",
        "t\nr: 5",
        {"r": 8},
        {"": "x\nr: 6", "r": "a\nseed: 1\x85" + "long " * 99},
        {"data": "#x: [y"},
    )
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {"data": "#x: [y", "r": 8}


def test_a_file_of_someone_else_is_kept(shown, tmp_path):
    file = tmp_path / "a.yaml"
    plan = shown["Plan"]
    assert plan.to_config(file) == plan.to_config(file), "its own may be replaced"
    for content in (file.read_text() + "seed: 1\n", "r: 8\n", ""):
        file.write_text(content)
        with pytest.raises(UserError, match="is there already"):
            plan.to_config(file)
        assert file.read_text() == content
    with pytest.raises(UserError, match="is there already"):
        plan.to_config(tmp_path)
    with pytest.raises(UserError, match="no setting 'colour'"):
        plan.to_config(tmp_path / "b.yaml", colour="red")
    with pytest.raises(UserError, match="nothing fits"):
        plan_training(LLAMA, "2 GB").to_config(tmp_path / "b.yaml")
    assert not (tmp_path / "b.yaml").exists()


def test_train_follows_a_file_that_fits_the_model(tmp_path, capsys):
    model = add_lora(load_model("qlora_nb:embedded")[0], r=8)
    (tmp_path / "mine.yaml").write_text("r: 8\nlora_alpha: 16\nlearning_rate: 0.01\nmax_steps: 3\nlimit: 5\nplan: T4\n")
    config, plan = split_plan(tmp_path / "mine.yaml", model)
    assert (config["max_steps"], plan) == (3, "T4") and "limit" in capsys.readouterr().err
    wrong = {
        "r: 16": "says r: 16, but the model has 8", "target_modules: [q_proj]": "says target_modules",
        "load_in_4bit: false": "says load_in_4bit", "model: me/m": "says model",
    }  # fmt: skip
    for line, message in wrong.items():
        (tmp_path / "other.yaml").write_text(line)
        with pytest.raises(UserError, match=message):
            split_plan(f"{tmp_path}/other.yaml", model)
    with pytest.raises(UserError, match="unknown settings: colour"):
        (tmp_path / "other.yaml").write_text("colour: red")
        split_plan(f"{tmp_path}/other.yaml", model)
    assert split_plan("auto", model) == (None, "auto")


# --- help and editors -----------------------------------------------------------------------------------------------


def test_help_has_every_setting_of_train_once():
    text, known = inspect.getdoc(qlora_nb.train), settings_of_part("trainer", "loop")
    grouped = [field.name for members in group_settings().values() for field in members]
    assert sorted(grouped) == sorted(known)
    for name in known:
        assert len(re.findall(rf"^- {name}: ", text, re.M)) == 1, name
    assert max(map(len, text.splitlines())) < 125
    parameters = inspect.signature(qlora_nb.train).parameters
    assert set(known) < set(parameters) and parameters["seed"].default == Settings().seed
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_editors_see_the_names_that_are_loaded_on_first_use():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in qlora_nb._WHERE.items()}
    assert set(qlora_nb.__all__) <= set(dir(qlora_nb))
    assert (PACKAGE / "py.typed").read_bytes() == b""
    assert '"py.typed"' in (ROOT / "setup.py").read_text() and "py.typed" in (ROOT / "MANIFEST.in").read_text()


def test_every_public_name_of_the_top_says_what_it_returns():
    for name in qlora_nb.__all__:
        found = getattr(qlora_nb, name)
        if inspect.isfunction(found):
            assert inspect.signature(found).return_annotation is not inspect.Signature.empty, name
