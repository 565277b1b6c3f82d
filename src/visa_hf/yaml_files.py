"""YAML files of people: reading them so that every error names the file and the line.

Values are plain data (`yaml.SafeLoader`). Unlike YAML 1.1, `2e-5` is a number, as everybody expects. What the keys
mean is the business of those who read the file.
"""

import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads `2e-5` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


class YamlFile:
    """A YAML file whose nodes still know their lines.

    Args:
        path (`str` or `os.PathLike`): the file.

    Attributes:
        path (`Path`): the file.
        root (`yaml.MappingNode`): its outermost mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or no mapping of names to values.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file `{self.path}`. Correct the path.")
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: this is not YAML: it is not UTF-8.") from error
        # Where values come from that are in no line of the file.
        self._origins: dict[yaml.Node, str] = {}
        root = self._composed(text, str(self.path))
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{self.path}: a mapping of names to values is needed, such as `name: value`.")
        self.root = root

    def override(self, assignment: str) -> None:
        """Set one value, as `--override a.b=value` does.

        Args:
            assignment (`str`): names from the outermost one, separated by dots, and a value in YAML.

        Raises:
            ValueError: it has another form, the value is no YAML, or a name on the way is that of a value.
        """
        origin = f"--override {assignment}"
        names, equals, text = assignment.partition("=")
        keys = names.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"{origin}: the form is `name.name=value`.")
        value = self._composed(text, origin) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        self._remember(value, origin)
        node = self.root
        for depth, key in enumerate(keys):
            is_last = depth == len(keys) - 1
            found = next((pair for pair in node.value if pair[0].value == key), None)
            following = value if is_last else yaml.MappingNode("tag:yaml.org,2002:map", [])
            if found is None or is_last:
                self._remember(following, origin)
                key_node = yaml.ScalarNode("tag:yaml.org,2002:str", key)
                self._origins[key_node] = origin
                node.value = [pair for pair in node.value if pair is not found] + [(key_node, following)]
                node = following
            else:
                node = found[1]
            if not is_last and not isinstance(node, yaml.MappingNode):
                raise ValueError(f"{origin}: `{'.'.join(keys[: depth + 1])}` is a value and has nothing below it.")

    def mapping(self, node: yaml.Node, what: str, known: Collection[str] | None = None) -> dict[str, yaml.Node]:
        """Return the values of a mapping by key.

        Args:
            node (`yaml.Node`): what should be a mapping.
            what (`str`): how errors call it.
            known (collection of `str`, *optional*): keys that may be there; any by default.

        Raises:
            ValueError: it is no mapping, or a key is unknown, there twice, or no text.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} must be a mapping of names to values.")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, f"{what} has a key that is no name.")
            key = key_node.value
            if key in found:
                raise self.error(key_node, f"{what} has the key `{key}` twice.")
            if known is not None and key not in known:
                raise self.error(key_node, f"{what} has the unknown key `{key}`. {nearest(key, known)}")
            found[key] = value
        return found

    def value(self, node: yaml.Node, what: str) -> Any:
        """Return what a node holds as plain data.

        Raises:
            ValueError: a mapping in it has a key twice, or a value cannot be read.
        """
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(inner, f"{what}.{key}") for key, inner in self.mapping(node, f"`{what}`").items()}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(inner, what) for inner in node.value]
        try:
            return _Loader("").construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.error(node, f"`{what}` cannot be read: {error}.") from error

    def scalar(self, node: yaml.Node, what: str) -> Any:
        """Return a single value.

        Raises:
            ValueError: it is a list or a mapping.
        """
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"`{what}` must be one value.")
        return self.value(node, what)

    def text(self, node: yaml.Node, what: str) -> str:
        """Return a text.

        Raises:
            ValueError: it is something else, or blank.
        """
        value = self.scalar(node, what)
        if not isinstance(value, str) or not value.strip():
            raise self.error(node, f"`{what}` is {value!r} but must be text.")
        return value

    def error(self, node: yaml.Node, message: str) -> ValueError:
        """Return an error that begins with the place of `node`."""
        if node in self._origins:
            return ValueError(f"{self._origins[node]}: {message}")
        return ValueError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def _composed(self, text: str, place: str) -> yaml.Node | None:
        try:
            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise ValueError(f"{place}{line}: this is not YAML: {error.problem or error.context}.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"{place}: this is not YAML: {error}.") from error

    def _remember(self, node: yaml.Node, origin: str) -> None:
        """Note where a node and those inside it come from."""
        self._origins[node] = origin
        children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else []
        children += node.value if isinstance(node, yaml.SequenceNode) else []
        for child in children:
            self._remember(child, origin)


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint for a misspelt name: the nearest known one, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(sorted(known))}."
