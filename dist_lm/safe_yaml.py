"""YAML of settings, parsed within bounds: it ends soon, takes little memory, and errs in one line.

Only plain values are made: mappings, lists, texts, numbers, true, false and null. A date stays the
text that it is. No tag calls anything.
"""

import re
from typing import Any

import yaml

from dist_lm.errors import UserError

LARGEST = 2**16  # characters of a file, and of its values with each alias written out

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_PLAIN_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in _PLAIN]
# Of what Python's functions raise for a text that does not fit its tag, e.g. !!int x.
_MISFITS = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """Plain values; 1e-4 is a number, and a key given twice is an error."""

    yaml_constructors = {  # noqa: RUF012 -- as yaml declares it
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in _PLAIN_TAGS
    }
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                line = key_node.start_mark.line + 1
                raise UserError(f"a list or mapping is no key (line {line}); rule: a text")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{key} is given twice (line {line}); rule: once")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        resolver for resolver in _resolvers if resolver[0] in _PLAIN_TAGS
    ]
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number. 1:59:59 is one in base 60, and may be too long to be printed."""
    number: int = loader.construct_yaml_int(node)
    str(number)  # raises ValueError if it is
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises UserError, in one line, for what is none."""
    if len(text) > LARGEST:
        raise UserError(f"is longer than {LARGEST:,} characters; rule: settings")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _length_written_out(node, {})
        return loader.construct_document(node)
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError("not valid YAML: it is nested too deeply") from error
    except _MISFITS as error:
        raise UserError(f"not valid YAML: a value is not what its tag says ({error})") from error


def _length_written_out(node: yaml.Node, lengths: dict[yaml.Node, int]) -> int:
    """The characters of a node's values, if each alias stood there as what it means.

    A few aliases of aliases can mean more than fits any memory. `lengths` are of the nodes so far.
    """
    if node in lengths:
        return lengths[node]
    lengths[node] = LARGEST  # an alias inside is one of the value itself, which has no end
    length = 1
    if isinstance(node, yaml.ScalarNode):
        length += len(node.value)
    else:
        for part in node.value:
            for inner in part if isinstance(part, tuple) else [part]:
                length += _length_written_out(inner, lengths)
    if length > LARGEST:
        line = node.start_mark.line + 1
        raise UserError(
            f"the aliases of line {line} mean more than {LARGEST:,} characters; rule: settings"
        )
    lengths[node] = length
    return length
