"""Which parameter takes which learning rate. Pure: names, patterns and numbers in, groups of an optimiser out."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    decayed: Collection[str],
    weight_decay: float,
    learning_rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group parameters by learning rate and by whether their weights decay.

    Args:
        parameters (`dict[str, nn.Parameter]`): what is trained, in the model's order.
        decayed (collection of `str`): names of those whose weights decay.
        weight_decay (`float`): theirs; the others have none.
        learning_rates (`dict[str, float]`, *optional*): regular expression -> learning rate; the first one that is
            found in a name counts.

    Returns:
        list of `dict` with `params`, `weight_decay` and, where an expression was found, `lr`; none of them empty.

    Raises:
        ValueError: if an expression is invalid, or counts for no parameter: a misspelt one would be ignored.
    """
    patterns = {}
    for pattern in learning_rates or {}:
        try:
            patterns[pattern] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`learning_rates` has {pattern!r}, which is no regular expression: {error}.") from None
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found = next((pattern for pattern, compiled in patterns.items() if compiled.search(name)), None)
        groups.setdefault((found, name in decayed), []).append(parameter)
    unused = [pattern for pattern in patterns if not any(pattern == found for found, _ in groups)]
    if unused:
        parts = sorted({re.sub(r"(\.layers)?\.\d+\..*|\.(weight|bias)$", "", name) for name in parameters})
        raise ValueError(
            f"`learning_rates` has {unused[0]!r}, which no trained parameter takes. Trained are "
            f"{', '.join(parts[:12])}{', ...' if len(parts) > 12 else ''}. Correct it, or move it up if an earlier "
            "expression takes its parameters."
        )
    return [
        {
            "params": params,
            "weight_decay": weight_decay if is_decayed else 0.0,
            **({} if pattern is None else {"lr": (learning_rates or {})[pattern]}),
        }
        for (pattern, is_decayed), params in groups.items()
    ]
