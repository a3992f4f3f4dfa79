"""The settings page: where values come from, what is refused and in which words, and what a run folder keeps."""

import dataclasses
import difflib
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import haste_conf
from haste_dist.config import Config, check, check_fan_in, load_config, save_config
from haste_dist.errors import ConfigError
from haste_dist.page import describe

SHIPPED = sorted(path.stem for path in Path(next(iter(haste_conf.__path__))).glob("*.yaml"))
FIELDS = [(part.name, f) for part in dataclasses.fields(Config) for f in dataclasses.fields(part.type)]
BOUNDED = [(part, f) for part, f in FIELDS if f.metadata.get("low") is not None or f.metadata.get("high") is not None]
CHOSEN = [(part, f) for part, f in FIELDS if f.metadata.get("choices")]


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(file: Path | str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = page(tmp_path, "train: {epochs: 3, batch_size: 64}\n")
    config = load_config(file, ["train.epochs=4", "train.epochs=5"])
    assert config.train.epochs == 5
    assert config.train.batch_size == 64
    assert config.train.log_every == Config().train.log_every
    assert load_config() == Config()
    assert load_config(page(tmp_path, "")) == Config()


@pytest.mark.parametrize(("part", "field"), FIELDS, ids=[f"{part}.{f.name}" for part, f in FIELDS])
def test_every_field_tells_what_it_is(part: str, field: dataclasses.Field) -> None:
    assert len(field.metadata["doc"]) > 8
    assert "\n" not in field.metadata["doc"]


def test_the_defaults_are_within_their_ranges() -> None:
    check(Config())


@given(data=st.data())
def test_values_outside_a_range_are_refused_and_those_inside_are_not(data: st.DataObject) -> None:
    part, field = data.draw(st.sampled_from(BOUNDED))
    low, high = field.metadata["low"], field.metadata["high"]
    sides = [side for side in (low, high) if side is not None]
    if field.type is int:
        outside = st.integers(max_value=low - 1) if high is None else st.integers(max_value=low - 1) | st.integers(min_value=high + 1)
        inside = st.integers(low, high)
    else:
        outside = st.floats(max_value=low, exclude_max=True, allow_infinity=False)
        if high is not None:
            outside |= st.floats(min_value=high, exclude_min=True, allow_infinity=False)
        inside = st.floats(low, high, allow_nan=False, allow_infinity=False)
    config = Config()
    section = getattr(config, part)
    setattr(section, field.name, data.draw(outside))
    with pytest.raises(ConfigError, match=rf"^{part}\.{field.name}=.*must be in \["):
        check(config)
    setattr(section, field.name, data.draw(st.sampled_from(sides) | inside))
    assume(not -1 < config.encoder.dropout < 0 and config.encoder.width % config.encoder.heads == 0)
    check(config)


@pytest.mark.parametrize(("part", "field"), CHOSEN, ids=[f"{part}.{f.name}" for part, f in CHOSEN])
def test_choices_are_kept_to(part: str, field: dataclasses.Field) -> None:
    for choice in field.metadata["choices"]:
        assert getattr(getattr(load_config(None, [f"{part}.{field.name}={choice}"]), part), field.name) == choice
    wrong = 17 if field.type is int else "nosuch"
    message = refusal(None, f"{part}.{field.name}={wrong}")
    assert all(str(choice) in message for choice in field.metadata["choices"])


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "-.inf", "1e400"])
def test_numbers_that_are_not_finite_are_refused(value: str) -> None:
    assert refusal(None, f"output.lr={value}").startswith("output.lr=")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("train.epoch=3", "train.epochs"),
        ("trian.epochs=3", "train"),
        ("output.fanin=3", "output.fan_in"),
        ("epochs=3", "train.epochs"),
        ("rewire.intervall=3", "rewire.interval"),
        ("evaluation.split=dev", "evaluate"),
    ],
)
def test_an_unknown_name_fails_with_the_nearest_valid_one(tmp_path: Path, word: str, near: str) -> None:
    name = word.split("=")[0]
    assert f"'{near}" in refusal(None, word)
    file = page(tmp_path, yaml.safe_dump({name.split(".")[0]: {name.split(".")[1]: 3} if "." in name else 3}))
    assert f"did you mean '{near}" in refusal(file)
    assert str(file) in refusal(file)


@given(data=st.data())
def test_one_wrong_letter_never_passes_and_finds_its_way_back(data: st.DataObject) -> None:
    part, field = data.draw(st.sampled_from(FIELDS))
    at = data.draw(st.integers(0, len(field.name) - 1))
    wrong = f"{part}.{field.name[:at]}{data.draw(st.sampled_from('abcxyz'))}{field.name[at + 1 :]}"
    known = [f"{p}.{f.name}" for p, f in FIELDS]
    assume(wrong not in known)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{wrong}=1"])
    suggestion = str(caught.value).split("did you mean '")[1].rstrip("'?")
    close = difflib.get_close_matches(wrong, [*known, *(p.name for p in dataclasses.fields(Config))], n=1, cutoff=0.0)[0]
    assert suggestion == close


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.log_every=1.5", "could not be converted to Integer"),
        ("train.log_every=true", "could not be converted to Integer"),
        ("train.epochs=many", "could not be converted to Float"),
        ("train.epochs=", "could not be converted to Float"),
        ("train.epochs=null", "None"),
        ("train.epochs=???", "has no value"),
        ("encoder.frozen=maybe", "not a valid bool"),
        ("output.head_features=[a]", "could not be converted to Integer"),
        ("run.folder=[1]", "Cannot convert"),
        ("run.folder=${nosuch}", "nosuch"),
        ("train=${nosuch}", "nosuch"),
        ("launch=cpu", "expected 'part: {name: value}' at launch"),
        ("epochs", "part.name=value"),
        ("=3", "part.name=value"),
        ("run.folder='x", "run.folder"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_one_line_with_its_name(word: str, says: str) -> None:
    message = refusal(None, word)
    assert says in message
    assert word.split("=")[0].split(".")[0] in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- train\n", "at the top"),
        ("train: [1]\n", "at train"),
        ("train:\n", "at train"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "duplicate key train, line 2"),
        ("\ttrain: 1\n", "line 1"),
        ("train: {epochs: soon}\n", "train.epochs: Value 'soon'"),
        ("train: !!python/object:os.system {}\n", "python/object"),
        ("train: ${nosuch}\n", "nosuch"),
        ("null: 3\n", "NoneType"),
    ],
)
def test_a_bad_page_is_told_in_one_line_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    file = page(tmp_path, text)
    message = refusal(file)
    assert says in message
    assert message.startswith(str(file))


def test_a_page_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "page.yaml"
    file.write_bytes(b"run: {folder: \xff}\n")
    assert "utf-8" in refusal(file)
    assert refusal(tmp_path / "nosuch.yaml").endswith(f"shipped ones: {', '.join(SHIPPED)}")
    assert "no such config file" in refusal(tmp_path)


def test_an_empty_string_can_be_set() -> None:
    assert load_config("demo", ["encoder.tokenizer="]).encoder.tokenizer == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["output.tail_features=[0,48]"], "output.fan_in=64 is larger than the 48 features"),
        (["output.tail_features=[10]"], "[start, end]"),
        (["output.head_features=[9,3]"], "[start, end]"),
        (["output.head_features=[-1,3]"], "[start, end]"),
        (["encoder.width=100", "encoder.heads=3"], "not a multiple"),
        (["encoder.dropout=-0.5"], "must be -1"),
        (["output.group_size=48"], "[1 | 16 | 32 | 64 | 128]"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], says: str) -> None:
    assert says in refusal(None, *words)


def test_fan_in_is_checked_against_the_width() -> None:
    check_fan_in(64, 64)
    with pytest.raises(ConfigError, match="fan_in=65 is larger than the 64 features"):
        check_fan_in(65, 64)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=40)


@settings(max_examples=25)  # two files each
@given(folder=TEXT.filter(lambda s: "${" not in s and not s.endswith("\\")), start=st.integers(0, 400), lr=st.floats(0, 1))
def test_what_is_saved_or_printed_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, folder: str, start: int, lr: float) -> None:
    assume(folder != "???")
    config = Config()
    config.run.folder = folder
    config.output.tail_features = [start, start + 64]
    config.encoder.lr = lr
    path = tmp_path_factory.mktemp("page") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    path.write_text(describe(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_printed_page_has_a_line_for_every_field() -> None:
    lines = describe(Config()).splitlines()
    assert len(lines) == len(FIELDS) + len(dataclasses.fields(Config))
    assert "  fan_in: 64                         # input features of a tail label [1 .. 1024]" in lines


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_page_loads_by_name_and_holds_differences_only(name: str) -> None:
    config = load_config(name)
    assert config.run.folder == f"runs/{name}"
    path = Path(next(iter(haste_conf.__path__))) / f"{name}.yaml"
    assert load_config(path) == config
    default = dataclasses.asdict(Config())
    ours = dataclasses.asdict(config)
    same = [
        f"{part}.{key}" for part, keys in yaml.safe_load(path.read_text()).items() for key in keys if ours[part][key] == default[part][key]
    ]
    assert same == [], "equal to the default: leave out"


def test_the_pages_that_the_work_needs_are_shipped() -> None:
    assert {
        "demo",
        "wordnet",
        "debian",
        "debian-mpnet",
        "wordnet-mpnet",
        "lf-amazontitles-131k",
        "amazon-670k",
        "amazon-3m",
        "lf-paper2keywords-8.6m",
    } <= set(SHIPPED)
