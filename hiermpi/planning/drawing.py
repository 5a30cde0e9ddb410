"""The plan is written as a text for a person here."""

from collections.abc import Sequence
from typing import Any

from hiermpi.planning.plan import Suggestion

MOST_GLYPHS = 24
LABEL = 22


def describe(planned: dict[str, Any], suggestions: Sequence[Suggestion] = ()) -> str:
    """Write the tree, the figures and the suggestions as one text."""
    parts = (figure_lines(planned), prediction_lines(planned), suggestion_lines(planned, suggestions))
    return "\n".join([*tree_lines(planned), "", *(line for part in parts for line in part)])


def tree_lines(planned: dict[str, Any]) -> list[str]:
    """Draw the ranks as a tree in which filled signs compute."""
    groups = planned["groups"]
    lines = [
        f"{count(planned['ranks'], 'rank')} on {count(planned['nodes'], 'node')}: 1 root, "
        f"{count(len(groups), 'control rank')}, {count(planned['workers'], 'worker')}; {planned['leaves']} compute "
        f"(coordinators: {planned['coordinators']})",
        "",
        f"{'■' if planned['root_computes'] else '□'} root 0",
    ]
    drawn = [glyphs(entry) for entry in groups]
    width = max((len(text) for text in drawn), default=0)
    names = [f"control {entry['control']}" for entry in groups]
    name_width = max((len(name) for name in names), default=0)
    below = [f"workers {ranges(entry['workers'])}" if entry["workers"] else "no workers" for entry in groups]
    below_width = max((len(text) for text in below), default=0)
    for entry, picture, name, workers in zip(groups, drawn, names, below, strict=True):
        line = (
            f"{'└' if entry is groups[-1] else '├'}─{picture:{width}}  group {entry['group']:<3} {name:{name_width}}  "
            f"{workers:{below_width}}  {'classes' if len(entry['classes']) > 1 else 'class'} {ranges(entry['classes'])}"
        )
        lines.append(line + (f"  {nodes_text(entry['nodes'])}" if planned["nodes"] > 1 else ""))
    signs = "■ root  ◆ control rank  ● worker" if planned["workers"] else "■ root  ◆ control rank"
    idle = "" if planned["leaves"] == planned["ranks"] else ", hollow ones coordinate"
    return [*lines, "", f"{signs}; filled ones compute{idle}"] if groups else lines


def glyphs(group: dict[str, Any]) -> str:
    """Write a sign for each rank of a group, its control rank first."""
    leaves = set(group["leaves"])
    signs = ("◆" if group["control"] in leaves else "◇") + "●" * len(group["workers"])
    return signs if len(signs) <= MOST_GLYPHS else signs[: MOST_GLYPHS - 2] + "…●"


def nodes_text(nodes: Sequence[int]) -> str:
    """Write which nodes these are."""
    return f"{'nodes' if len(nodes) > 1 else 'node'} {ranges(nodes)}"


def figure_lines(planned: dict[str, Any]) -> list[str]:
    """Write the lines of parameters, loads, memory and bytes."""
    load, memory, moved = planned["sequences_per_leaf"], planned["memory_bytes"], planned["bytes_per_step"]
    spread = f"{load['most']}" if load["least"] == load["most"] else f"{load['least']} to {load['most']}"
    lines = [
        f"{'parameters':{LABEL}}{planned['parameters']:,} ({planned['family']}, vocabulary {planned['vocab_size']:,})",
        f"{'batch':{LABEL}}{planned['batch_size']} sequences, {planned['tokens_per_step']:,} tokens a step",
        f"{'sequences per leaf':{LABEL}}{spread}"
        + ("" if load["least"] else "  (some leaves have nothing to do: raise train.batch_size)"),
        f"{'optimizer':{LABEL}}{owners_text(planned)}",
        f"{'memory per rank':{LABEL}}root {size(memory['root'])}"
        + (f", control {size(memory['control'])}" if planned["controls"] else "")
        + (f", worker {size(memory['worker'])}" if planned["workers"] else "")
        + f"; root while it saves {size(memory['root_while_saving'])}"
        + ("; without activations" if "workspace_bytes" in planned["not_given"] else ""),
        f"{'memory per node':{LABEL}}{size(memory['node'])}"
        + ("" if planned["nodes"] == 1 else " on the fullest")
        + (" (one copy of the parameters)" if planned["shared_memory"] else ""),
    ]
    if planned["shared_memory"]:
        lines.append(f"{'per step, in nodes':{LABEL}}{size(moved['node_read'])} of gradients read where they lie")
        if planned["nodes"] > 1:
            lines.append(
                f"{'per step, nodes':{LABEL}}{size(moved['nodes_up'])} up, {size(moved['nodes_down'])} down"
            )
        return lines
    for name, shown in (("control", bool(planned["controls"])), ("group", bool(planned["workers"]))):
        if shown:
            up, down = moved[f"{name}_up"], moved[f"{name}_down"]
            lines.append(f"{'per step, ' + name:{LABEL}}{size(up)} up, {size(down)} down")
    return lines


def owners_text(planned: dict[str, Any]) -> str:
    """Write which ranks update how many parameters."""
    owned = [entry["owned_parameters"] for entry in planned["groups"]]
    if not any(owned):
        return "the root updates all parameters"
    least, most = min(owned), max(owned)
    each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    root = f", the root {planned['root_owns']:,}" if planned["root_owns"] else ""
    return f"each control rank updates {each} parameters, its classes' rows among them{root}"


def prediction_lines(planned: dict[str, Any]) -> list[str]:
    """Write how long a step is predicted to take, or how to measure what the prediction needs."""
    found = planned.get("prediction")
    if "flops_per_token" in planned["not_given"]:
        return [f"{'a step takes':{LABEL}}not known: {planned['family']} does not give flops_per_token"]
    if not found:
        return [f"{'a step takes':{LABEL}}not known: run mpirun -n {planned['ranks']} hiermpi bench reduce on a node"]
    phases = ", ".join(f"{name} {milliseconds(found[name])}" for name in ("compute", "reduce", "optimize", "other"))
    machine = found["machine"]
    return [
        f"{'a step takes':{LABEL}}{milliseconds(found['step_seconds'])} ({phases})",
        f"{'that is':{LABEL}}{found['tokens_per_second']:,.0f} tokens/s, {found['speed_up']:.2f} times one rank's; "
        f"{100 * found['utilisation']:.0f} % of the cores compute",
        f"{'95 % compute from':{LABEL}}{threshold(found['tokens_for_utilisation'])}",
        f"{'root 1 : 40 from':{LABEL}}{threshold(found['tokens_for_root_to_worker'])}",
        f"{'predicted from':{LABEL}}{machine['ranks']} ranks on {machine['cores']} cores of {machine['host']}, "
        f"{machine['date']}" + ("; a slower network between nodes is not in it" if planned["nodes"] > 1 else ""),
    ]


def threshold(tokens: int | None) -> str:
    """Write a number of tokens, or that there is none."""
    return "no batch size" if tokens is None else f"{tokens:,} tokens for each leaf and step"


def milliseconds(seconds: float) -> str:
    """Write seconds in a unit that suits their size."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def suggestion_lines(planned: dict[str, Any], suggestions: Sequence[Suggestion]) -> list[str]:
    """Write the lines that ``--suggest`` adds."""
    if not suggestions:
        return []
    lines = ["", "suggested"]
    lines += [f"    {f'--{entry.setting} {entry.value}':30}{entry.why}" for entry in suggestions]
    return lines


def count(n: int, thing: str) -> str:
    """Write ``n`` with the name of the thing in its singular or plural."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def ranges(numbers: Sequence[int]) -> str:
    """Write sorted integers with runs shortened, such as ``2-6, 9``."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def size(n_bytes: float) -> str:
    """Write bytes in a unit that suits their number."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
