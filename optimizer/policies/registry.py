"""Policies by name. Looking a policy up does not load a solver; the first plan of an exact one does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from optimizer.policies.reductions import planned_on_quantile
from protocol.errors import InputError
from protocol.plan import Plan, Problem

Policy = Callable[[Problem, float], Plan]
"""(problem, wall-clock budget in seconds) -> plan. Raises PlanError when it has none."""


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """Where a policy is found. ``exact``: it strives for the best plan, so that any better plan at hand may be
    sent instead of its own; the others are sent as they are. ``solver``: it loads a solver and runs in a child.
    ``offers``: takes a third argument, a function that it hands plans to before it is done. ``warm``: a function of
    the module that loads what the policy would load at its first problem."""

    module: str
    function: str
    exact: bool = False
    solver: bool = False
    offers: bool = False
    warm: str = ""


POLICIES: dict[str, PolicyEntry] = {
    "milp": PolicyEntry("optimizer.policies.ladder", "static_plan", exact=True, solver=True, offers=True),
    "timeline": PolicyEntry(
        "optimizer.policies.ladder", "timeline_or_static", exact=True, solver=True, offers=True, warm="warm"
    ),
    "thief": PolicyEntry("optimizer.policies.baselines", "thief_or_uniform"),
    "marginal": PolicyEntry("optimizer.policies.marginal", "marginal"),
    "thief:one-pass": PolicyEntry("optimizer.policies.thief", "thief_one_pass"),
    "thief:fixed-config": PolicyEntry("optimizer.policies.baselines", "thief_fixed_config"),
    "thief:fixed-shares": PolicyEntry("optimizer.policies.baselines_study", "thief_fixed_shares"),
    "uniform": PolicyEntry("optimizer.policies.baselines", "uniform"),
    "fair": PolicyEntry("optimizer.policies.baselines", "fair"),
    "none": PolicyEntry("optimizer.policies.baselines", "none", solver=True),
}


def policy_entry(name: str) -> PolicyEntry:
    """The entry of ``name`` (``uniform:LEVEL:PART`` counts as uniform). InputError when there is none."""
    if name in POLICIES:
        return POLICIES[name]
    if _uniform_parameters(name) is not None:
        return POLICIES["uniform"]
    known = ", ".join([*POLICIES, "uniform:low|middle|high:PART"])
    raise InputError(f"unknown policy {name!r}; there are {known}")


def get_policy(name: str) -> Policy:
    """The policy called ``name``, asked at a problem's planning quantile.

    InputError, listing what exists, when there is none.
    """
    entry = policy_entry(name)
    module = importlib.import_module(entry.module)
    parameters = None if name in POLICIES else _uniform_parameters(name)
    if parameters is not None:
        variant: Policy = module.uniform_variant(*parameters)
        return planned_on_quantile(variant)
    policy: Policy = getattr(module, entry.function)
    return planned_on_quantile(policy)


def warm_up(name: str) -> None:
    """Load what the policy would load at its first problem, as far as that can be had soon."""
    entry = policy_entry(name)
    if entry.warm:
        getattr(importlib.import_module(entry.module), entry.warm)()


def _uniform_parameters(name: str) -> tuple[str, float] | None:
    parts = name.split(":")
    if len(parts) != 3 or parts[0] != "uniform" or parts[1] not in ("low", "middle", "high"):
        return None
    try:
        part = float(parts[2])
    except ValueError:
        return None
    return (parts[1], part) if 0.0 < part <= 1.0 else None
