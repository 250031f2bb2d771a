"""Parameters that several nodes read: one tensor is stored once, so rules must want the same of it for each reader."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import Plan, describe_spec
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.graph.attributes import attribute_reads, tensors_of
from zeropoint.graph.bind import Site, reads, source_of
from zeropoint.graph.source import describe


def check_tied(model: GraphModule, plan: Plan) -> None:
    """Raises when rules want different things of one parameter, for two nodes that read it as the same argument.

    A reader that the backend cannot quantize, such as an embedding, reads a float copy. Annotations of a quantizer
    that decides by no rules may differ.

    Raises:
        AnnotationError: names the parameter, both readers, and what is wanted for each.
    """
    for sites in _reads_by_tensor(model):
        chosen = next((site for site in sites if site in plan.specs), None)
        other = next((site for site in sites if chosen is not None and _contradicts(plan, chosen, site)), None)
        if chosen is not None and other is not None:
            what = (
                f"the parameter {source_of(other).target} is tied: {_wanted(plan, chosen)} and {_wanted(plan, other)}"
            )
            remedy = "Give both layers the same rule; one tensor is stored once."
            raise AnnotationError(what, where=describe(other.node), remedy=remedy)


def _reads_by_tensor(model: GraphModule) -> list[list[Site]]:
    """Returns the sites that read each parameter, by its tensor and the name of the argument that it is read as."""
    found: dict[tuple[int, str], list[Site]] = defaultdict(list)
    tensors = tensors_of(model)
    for parameter in attribute_reads(model.graph):
        tensor = tensors.get(str(parameter.target))
        if tensor is None:
            continue
        for reader in parameter.users:
            for site, source in reads(reader):
                if source is parameter:
                    found[id(tensor), site.argument].append(site)
    return list(found.values())


def _contradicts(plan: Plan, chosen: Site, site: Site) -> bool:
    """True when a rule wants something else of the tensor at ``site`` than at ``chosen``, where it is quantized."""
    if site not in plan.specs:
        decision = plan.decisions.get(site.node)
        by = None if decision is None else decision.refused_by
        return by == "rule" or (by == "no rule" and _is_by_rule(plan, chosen.node))
    specs = [plan.specs[each] for each in (chosen, site)]
    if not all(_is_by_rule(plan, each.node) for each in (chosen, site)):
        return False
    # The axis is the operator's: a convolution and a transposed one read one weight by one rule.
    plain = [replace(spec, ch_axis=None) for spec in specs if isinstance(spec, QuantizationSpec)]
    return len(plain) == 2 and plain[0] != plain[1]


def _is_by_rule(plan: Plan, node: Node) -> bool:
    """True when a rule chose what the node is quantized by."""
    decision = plan.decisions.get(node)
    return decision is not None and decision.refusal is None


def _wanted(plan: Plan, site: Site) -> str:
    if site in plan.specs:
        return f"{site} is quantized to {describe_spec(plan.specs[site])}"
    return f"{site} is left float ({plan.decisions[site.node].refusal})"
