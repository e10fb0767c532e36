"""Docstrings in Sphinx's words (``:func:`name```, ``::``, ``#:``, ``Example:``) as mkdocstrings understands them."""

import ast
import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|data):`([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns roles into links to what has a docstring, and into docstrings ``#:`` comments and the help of options."""

    def on_package(self, *, pkg, **_):
        objects = [pkg]
        for here in objects:
            objects += [member for member in here.members.values() if not member.is_alias]
        for here in objects:
            if here.is_attribute and not here.docstring:
                here.docstring = _comment(here)
        for here in objects:
            if here.docstring:
                here.docstring.value += _options(here)
                text = _ROLE.sub(lambda found, here=here: _link(pkg, here, found[1]), here.docstring.value)
                text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
                here.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # shows >>> as code


def _comment(attribute):
    lines = attribute.lines_collection[attribute.filepath]
    begin = end = attribute.lineno - 1
    while begin and lines[begin - 1].strip().startswith("#:"):
        begin -= 1
    text = "\n".join(line.strip().removeprefix("#:").strip() for line in lines[begin:end])
    return griffe.Docstring(text, lineno=begin + 1, parent=attribute) if text else None


def _options(here):
    """The ``Args`` of a dataclass whose fields have ``metadata={"help": ...}``, as those of transformers do."""
    helps = {}
    for name, field in here.attributes.items() if here.is_class else ():
        for argument in getattr(field.value, "arguments", ()):
            if getattr(argument, "name", None) == "metadata":
                helps[name] = ast.literal_eval(str(argument.value))["help"]
    lines = [f"\n    {name}: {text}" for name, text in helps.items()]
    return "".join(["\n\nArgs:", *lines]) if lines else ""


def _link(package, here, name):
    name = name.removeprefix(package.path + ".")
    found = _find(here, name.split("."))
    if found is None or found.is_private or not found.docstring:
        return f"`{name}`"
    return f"[`{name}`][{found.path}]"


def _find(here, parts):
    """The object that a name in a docstring means: from the innermost scope that has its first part, as in Python."""
    found = here
    while parts[0] not in found.members:
        found = found.parent
        if found is None:
            return None
    for part in parts:
        found = found.members.get(part)
        if found is None:
            return None
        found = found.final_target if found.is_alias else found
        if found.is_module:  # the package has a function by each module's name
            found = found.members.get(part, found)
    return found
