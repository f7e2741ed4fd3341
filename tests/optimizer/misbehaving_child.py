"""A solver child that misbehaves as its environment says (EKYA_TEST_CHILD), for tests of the planner.

hang: never answers; deaf: the same, and does not hear that a question is dropped; crash: ends when asked;
dead: ends at once; mute: says nothing, not even ready;
garbage: answers with noise; long: announces a frame of 4 GB; infeasible: says there is no plan;
broken: answers with a plan that breaks the rules; lie: answers with a bound below its own plan's value;
late: answers after EKYA_TEST_DELAY seconds; honest: answers with the cheapest plan.
"""

import os
import signal
import socket
import sys
import time

import msgspec

from optimizer.policies.baselines import cheapest, fair
from optimizer.solver_child import Answer, frame, take_question
from protocol.plan import Plan


def main(how: str) -> None:
    link = socket.socket(fileno=os.dup(0))
    if how == "deaf":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if how == "dead":
        sys.exit(3)
    if how != "mute":
        link.sendall(frame(Answer(serial=0)))
    buffer = bytearray()
    while chunk := link.recv(1 << 20):
        buffer += chunk
        while (question := take_question(buffer)) is not None:
            plan: Plan = cheapest(question.problem)
            if how in ("hang", "mute", "deaf"):
                time.sleep(3600.0)
            elif how == "crash":
                os.abort()
            elif how == "garbage":
                link.sendall(b"\x00\x00\x00\x05noise" * 50)
            elif how == "long":
                link.sendall(b"\xff\xff\xff\xff" + b"x" * 100)
            elif how == "infeasible":
                link.sendall(frame(Answer(serial=question.serial, reason="INFEASIBLE")))
            elif how == "broken":
                plan = msgspec.structs.replace(plan, assignments=plan.assignments[1:])
                link.sendall(frame(Answer(serial=question.serial, plan=plan)))
            elif how == "lie":
                plan = fair(question.problem, 1.0)
                report = msgspec.structs.replace(plan.report, status="optimal", bound=0.01, gap=0.0)
                link.sendall(frame(Answer(serial=question.serial, plan=msgspec.structs.replace(plan, report=report))))
            else:
                time.sleep(float(os.environ.get("EKYA_TEST_DELAY", "0")))
                link.sendall(frame(Answer(serial=question.serial, plan=plan)))


if __name__ == "__main__":
    main(os.environ["EKYA_TEST_CHILD"])
