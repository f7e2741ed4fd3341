"""A real solver child into which faults are injected: the id of a problem's first GPU ends with the fault's name.

``python faulty_solver.py POLICY`` speaks the protocol of ``optimizer.solver_child``. Faults are listed in ``FAULTS``
with what the planner's report has to say about them.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import sys
import time

import msgspec

from optimizer.policies.baselines import cheapest
from optimizer.policies.registry import get_policy
from optimizer.problems import random_problem
from optimizer.solver_child import Answer, Question, frame, take_question
from protocol.plan import Plan, Problem

# Fault -> words of which the report has to hold one; () = nothing is wrong.
FAULTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "hang": ("no answer within",),
    "crash": ("killed by signal", "closed its connection"),
    "exit": ("exit code 7", "closed its connection"),
    "garbage": ("garbage",),
    "long": ("garbage",),
    "infeasible": ("INFEASIBLE",),
    "broken": ("cannot be executed",),
    "nonsense": ("cannot be executed",),
    "lie": ("does not hold", "is better than"),
    "nan": ("garbage",),
    "flood": ("does not stop answering", "no answer within"),
    "trickle": ("no answer within",),
    "stale": ("no answer within",),
    "late": ("no answer within",),
    "endless": ("more steps", "garbage", "sent more"),
    "early": ("no answer within",),
    "fork": ("no answer within",),
}


def with_fault(problem: Problem, fault: str) -> Problem:
    """The same problem for a child that fails as ``fault`` says."""
    first = msgspec.structs.replace(problem.gpus[0], gpu_id=f"gpu0-{fault}")
    return msgspec.structs.replace(problem, gpus=(first, *problem.gpus[1:]))


def fault_of(problem: Problem) -> str:
    return problem.gpus[0].gpu_id.rpartition("-")[2]


def misbehave(link: socket.socket, question: Question, policy_name: str) -> None:
    """Answer as the problem wants it."""
    problem, serial = question.problem, question.serial

    def say(plan: Plan | None, reason: str = "", final: bool = True) -> None:
        link.sendall(frame(Answer(serial=serial, plan=plan, reason=reason, final=final)))

    def solved() -> Plan:
        return get_policy(policy_name)(problem, max(0.0, question.deadline_s - time.monotonic()))

    match fault_of(problem):
        case "hang":
            time.sleep(3600.0)
        case "fork":  # a grandchild that holds the connection open
            if os.fork() == 0:
                time.sleep(20.0)
                os._exit(0)
            os.kill(os.getpid(), 9)
        case "crash":
            os.kill(os.getpid(), 11)
        case "exit":
            os._exit(7)
        case "garbage":
            link.sendall(b"\x00\x00\x00\x05noise" * 50)
        case "long":
            link.sendall(b"\xff\xff\xff\xff" + b"x" * 100)
        case "infeasible":
            say(None, "INFEASIBLE")
        case "broken":
            plan = cheapest(problem)
            say(msgspec.structs.replace(plan, assignments=plan.assignments[1:]))
        case "nonsense":
            plan = cheapest(problem)
            first = plan.assignments[0]
            step = msgspec.structs.replace(first.inference[0], inference_id="nothing", gpu_id="nowhere", share=1e-9)
            strange = msgspec.structs.replace(first, inference=(step,))
            say(msgspec.structs.replace(plan, assignments=(strange, *plan.assignments[1:])))
        case "lie":
            plan = solved()
            report = msgspec.structs.replace(plan.report, status="optimal", bound=0.01, gap=0.0, value=1.0)
            say(msgspec.structs.replace(plan, report=report))
        case "nan":
            plan = cheapest(problem)
            report = msgspec.structs.replace(plan.report, bound=math.nan, value=math.inf)
            data = msgspec.msgpack.encode(Answer(serial=serial, plan=msgspec.structs.replace(plan, report=report)))
            link.sendall(struct.pack(">I", len(data)) + data)
        case "flood":
            noise = frame(Answer(serial=0)) * 1000
            while True:
                link.sendall(noise)
        case "trickle":
            data = frame(Answer(serial=serial, plan=cheapest(problem)))
            link.sendall(data[: len(data) // 2])
            time.sleep(3600.0)
        case "stale":
            link.sendall(frame(Answer(serial=serial + 1, plan=cheapest(problem))))
            link.sendall(frame(Answer(serial=max(0, serial - 1), plan=cheapest(problem))))
            time.sleep(3600.0)
        case "late":
            time.sleep(max(0.0, question.deadline_s - time.monotonic()) + 0.2)
            say(cheapest(problem))
        case "endless":
            plan = cheapest(problem)
            first = plan.assignments[0]
            endless = msgspec.structs.replace(first, inference=first.inference * 50_000)
            say(msgspec.structs.replace(plan, assignments=(endless, *plan.assignments[1:])))
        case "early":
            say(solved(), final=False)
            time.sleep(3600.0)
        case _:
            say(solved())


def main(policy_name: str) -> None:
    link = socket.socket(fileno=os.dup(0))
    get_policy(policy_name)(random_problem(2, 1, 3, seed=0), 1.0)
    link.sendall(frame(Answer(serial=0)))
    buffer = bytearray()
    while chunk := link.recv(1 << 20):
        buffer += chunk
        while (question := take_question(buffer)) is not None:
            with contextlib.suppress(OSError):  # the planner has had enough
                misbehave(link, question, policy_name)


if __name__ == "__main__":
    main(sys.argv[1])
