"""What has to fit together across keys, beyond the kind of each value."""

from __future__ import annotations

import re

from emotrain.config import builtin
from emotrain.config.explain import leaf
from emotrain.config.guess import likely
from emotrain.config.paths import folder_names
from emotrain.config.prompts import LOOKS_FOREIGN, parse_prompt
from emotrain.config.schema import EMO_OPTIMIZERS, OPTIMIZERS
from emotrain.config.source import Node
from emotrain.config.words import as_mapping
from emotrain.errors import ConfigError, Problem

_USUAL_LR = {
    "adamw": "1e-4",
    "lion": "2e-5",
    "adafactor": "1e-4",
    "prodigy": "1.0",
    "schedulefree": "1e-3",
}
RATE_OF_ITS_OWN = ("emonavi", "emofact", "emolynx")  # generation 3.6: `lr` is the rate itself, 1e-3
PUBLISHED_UNIT = ("emoairy", "emocats", "emotion", "emovoid")  # LR 1.0 is what their author found, on other models
SMALL_LR = 0.1
_RANK_WORDS = ("rank", "alpha", "conv_rank", "rank_pattern")
_EMO_WORDS = ("generation", "use_shadow", "stopcoef", "sensor", "bias_correction", "notify")


def check_rules(root: Node) -> tuple[list[Problem], list[str]]:
    """Look at a merged tree whose values may still be wrong one by one.

    Returns:
        Problems, and notes on settings without effect.
    """
    problems = [*_optimizer(root), *_small_lr(root), *_buckets(root), *_builtin_names(root), *_prompts(root)]
    problems += [*_path_variables(root), *_shares(root), *_class(root)]
    return problems, [
        *_no_effect(root),
        *_gain_without_effect(root),
        *_unit_not_measured(root),
        *_network_without_effect(root),
        *_bare_trigger(root),
        *_foreign_prompt_words(root),
        *_repeats_without_effect(root),
        *_likeness_without_effect(root),
    ]


def _small_lr(root: Node) -> list[Problem]:
    """A learning rate of another optimizer, copied to one whose unit it scales: 1e-4 would turn it off."""
    lr, name = leaf(root, "train.lr"), leaf(root, "train.optimizer.name")
    word = "emosens" if name is None else name.value
    generation, allowed = leaf(root, "train.optimizer.generation"), leaf(root, "train.allow_small_lr")
    if word not in EMO_OPTIMIZERS or word in RATE_OF_ITS_OWN or (generation is not None and generation.value == "3.6"):
        return []
    if lr is None or not isinstance(lr.value, int | float) or isinstance(lr.value, bool) or not 0 < lr.value < SMALL_LR:
        return []
    if allowed is not None and allowed.value is True:
        return []
    return [
        Problem(
            f"{lr.where}: train.lr is {lr.text or lr.value}, and `{word}` multiplies its own step length by it: "
            "it would hardly learn anything",
            "leave train.lr out (it is 1.0), or write `optimizer: adamw` if you mean that rate; "
            "`train.allow_small_lr: true` insists",
        )
    ]


def _prompts(root: Node) -> list[Problem]:
    """The flags behind sample prompts."""
    problems = []
    for node in _prompt_nodes(root):
        try:
            parse_prompt(str(node.value))
        except ValueError as error:
            problems.append(Problem(f"{node.where}: a sample prompt's {error}"))
    return problems


def _foreign_prompt_words(root: Node) -> list[str]:
    return [
        f"{node.where}: `{match[0]}` in a sample prompt is drawn as words: weights and <lora:...> have no effect here"
        for node in _prompt_nodes(root)
        if (match := LOOKS_FOREIGN.search(str(node.value)))
    ]


def _prompt_nodes(root: Node) -> list[Node]:
    prompts = leaf(root, "sample.prompts")
    if prompts is None or not isinstance(prompts.value, list):
        return []
    return [node for node in prompts.value if isinstance(node.value, str)]


def _optimizer(root: Node) -> list[Problem]:
    name = leaf(root, "train.optimizer.name")
    if name is None or name.value in EMO_OPTIMIZERS or name.value not in OPTIMIZERS:
        return []
    problems = []
    lr = leaf(root, "train.lr")
    if lr is None or lr.value is None:
        usual = _USUAL_LR[str(name.value)]
        problems.append(
            Problem(
                f"{name.where}: train.lr is missing, and only the emo optimizers do without: `{name.value}` needs one",
                f"a usual one for a LoRA is `lr: {usual}`",
            )
        )
    mode = leaf(root, "stop.mode")
    if mode is not None and mode.value == "signal":
        problems.append(
            Problem(
                f"{mode.where}: stop.mode is `signal`, which `{name.value}` does not give",
                "`trusted` watches the validation, `off` goes to train.max_steps",
            )
        )
    return problems


def _buckets(root: Node) -> list[Problem]:
    low, high = leaf(root, "dataset.buckets.min"), leaf(root, "dataset.buckets.max")
    if low is None or high is None:
        return []
    if isinstance(low.value, int) and isinstance(high.value, int) and low.value > high.value:
        return [
            Problem(
                f"{low.where}: dataset.buckets.min is {low.value}, which is above dataset.buckets.max, {high.value}"
            )
        ]
    return []


def _builtin_names(root: Node) -> list[Problem]:
    places: list[tuple[Node | None, tuple[str, ...], str]] = [
        (leaf(root, "model.base"), builtin.MODELS, "model"),
        (leaf(root, "sample.base"), builtin.MODELS, "model"),
        (leaf(root, "validate.folder"), builtin.DATASETS, "data set"),
    ]
    places += [(node, builtin.DATASETS, "data set") for node in _folder_nodes(root, "path")]
    problems = []
    for node, known, kind in places:
        if node is not None and isinstance(node.value, str) and builtin.is_builtin(node.value):
            try:
                builtin.check_name(node.value, known, kind)
            except ConfigError as error:
                problems.append(Problem(f"{node.where}: {error.message}", error.hint))
    return problems


VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]\w*%")


def _path_variables(root: Node) -> list[Problem]:
    """`$HOME/pics`, `%USERPROFILE%`: variables stay as they are, so that a preset means the same to everybody."""
    keys = (
        "model.base",
        "model.vae",
        "model.text_encoder",
        "model.tokenizer",
        "start_from.continue",
        "sample.base",
        "validate.folder",
        "validate.likeness",
    )
    nodes = [leaf(root, key) for key in keys]
    nodes += [*_folder_nodes(root, "path"), *_folder_nodes(root, "mask")]
    return [
        Problem(
            f"{node.where}: `{match[0]}` in a path is not replaced by its value",
            "write the folder out; `~` is your home folder",
        )
        for node in nodes
        if node is not None and isinstance(node.value, str) and (match := VARIABLE.search(node.text or node.value))
    ]


def _shares(root: Node) -> list[Problem]:
    """`dataset.balance` names every folder once, by the name that its pictures' ids begin with."""
    balance = leaf(root, "dataset.balance")
    if balance is None or not isinstance(balance.value, dict) or not balance.value:
        return []
    names = folder_names([str(node.value) for node in _folder_nodes(root, "path")])
    problems = []
    for name, node in balance.value.items():
        if name not in names:
            hint = likely(name, names) or f"the folders are {', '.join(names)}"
            problems.append(
                Problem(f"{node.where}: dataset.balance names `{name}`, which is none of the folders", hint)
            )
    missing = [name for name in names if name not in balance.value]
    if missing and not problems:
        what = f"dataset.balance has no share for {', '.join(missing)}"
        problems.append(Problem(f"{balance.where}: {what}", "every folder needs one; `equal` gives all the same"))
    return problems


def _class(root: Node) -> list[Problem]:
    """The class is what is kept apart from the trigger: it needs one, and cannot hold it."""
    word, trigger = leaf(root, "dataset.class"), leaf(root, "dataset.trigger")
    if word is None or not isinstance(word.value, str):
        return []
    own = str(trigger.value).strip() if trigger is not None and trigger.value is not None else ""
    if not own:
        what = f"dataset.class is `{word.value}` without a dataset.trigger, which alone tells the two apart"
        return [Problem(f"{word.where}: {what}", "give the LoRA a word of its own: `trigger: mika_ch`")]
    if not re.search(rf"(?<!\w){re.escape(own)}(?!\w)", word.value, re.IGNORECASE):
        return []
    what = f"dataset.class is `{word.value}`, which holds the trigger `{own}`: what is to be learned would be kept off"
    return [Problem(f"{word.where}: {what}", "name what the model knows already: `class: woman`")]


def _repeats_without_effect(root: Node) -> list[str]:
    balance = leaf(root, "dataset.balance")
    if balance is None or balance.value == "repeats":
        return []
    return [
        f"{node.where}: repeats has no effect beside dataset.balance, which sets them by share"
        for node in _folder_nodes(root, "repeats")
        if node.value != 1
    ]


def _likeness_without_effect(root: Node) -> list[str]:
    model, every = leaf(root, "validate.likeness"), leaf(root, "sample.every")
    if model is None or model.value is None or every is None or every.value != 0:
        return []
    return [f"{model.where}: validate.likeness has no effect with sample.every 0: it looks at the samples"]


def _folder_nodes(root: Node, key: str) -> list[Node]:
    """The nodes under a key of all data folders that have it."""
    folders = leaf(root, "dataset.folders")
    items = folders.value if folders is not None and isinstance(folders.value, list) else []
    return [node for item in items if (node := as_mapping(item).get(key)) is not None]


def _no_effect(root: Node) -> list[str]:
    name = leaf(root, "train.optimizer.name")
    if name is None or name.value in EMO_OPTIMIZERS or name.value not in OPTIMIZERS:
        return []
    words = as_mapping(leaf(root, "train.optimizer"))
    return [
        f"{words[word].where}: train.optimizer.{word} has no effect on `{name.value}`"
        for word in _EMO_WORDS
        if word in words
    ]


def _gain_without_effect(root: Node) -> list[str]:
    gain, name = leaf(root, "train.gain"), leaf(root, "train.optimizer.name")
    generation = leaf(root, "train.optimizer.generation")
    if gain is None or gain.value != "auto":
        return []
    if name is not None and name.value != "emosens":
        return [f"{gain.where}: train.gain has no effect on `{name.value}`: emosens alone measures it"]
    if generation is not None and generation.value == "3.7.0":
        return [f"{gain.where}: train.gain has no effect on generation 3.7.0, whose steps have a length of their own"]
    return []


def _unit_not_measured(root: Node) -> list[str]:
    """An emo optimizer whose LR 1.0 is the published step length, which no run measures."""
    name, lr = leaf(root, "train.optimizer.name"), leaf(root, "train.lr")
    if name is None or name.value not in PUBLISHED_UNIT or (lr is not None and lr.value not in (None, 1, 1.0)):
        return []
    return [
        f"{name.where}: `{name.value}` takes steps of the published length, which may not suit this model: give it a"
        " train.lr of its own (0.3 and 3 are worth a try), or use emosens, which measures its step length"
    ]


def _network_without_effect(root: Node) -> list[str]:
    """Words of the other kind of network, beside the word that says which it is."""
    kind, words = leaf(root, "network.type"), as_mapping(leaf(root, "network"))
    if kind is None or kind.value not in ("lora", "lokr"):
        return []
    without = _RANK_WORDS if kind.value == "lokr" else ("factor",)
    return [
        f"{words[word].where}: network.{word} has no effect on a {'LoKr' if kind.value == 'lokr' else 'LoRA'}"
        for word in without
        if word in words and words[word].source == kind.source
    ]


def _bare_trigger(root: Node) -> list[str]:
    """`prompts: [trigger]` is a YAML list with the word `trigger` in it."""
    prompts = leaf(root, "sample.prompts")
    if prompts is None or not isinstance(prompts.value, list):
        return []
    return [
        f'{node.where}: a prompt is the bare word `trigger`; quotes keep the brackets: "[trigger]"'
        for node in prompts.value
        if node.value == "trigger"
    ]
