"""Subjects of a benchmark in processes of their own, which take turns: whatever else the machine does falls on all."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time


class Process:
    """A benchmark's file run with other arguments; messages come from it line by line."""

    def __init__(self, file, *arguments, python=sys.executable, **variables):
        """variables: of the environment, beside those there are; None takes one away."""
        environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
        self.arguments, self.errors = arguments, tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        command = [python, file, "--child", *map(str, arguments)]
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment)

    def hear(self):
        """The next message, a dict; None where it has ended."""
        for line in self.child.stdout:
            if line.startswith("{"):  # else somebody's chatter
                return json.loads(line)
        return None

    def expect(self):
        """The next message; a RuntimeError with the process's last errors where there is none."""
        message = self.hear()
        if message is None:
            self.child.wait()
            raise RuntimeError(f"{self.arguments} ended early ({self.child.returncode}):\n{self.last_errors()}")
        return message

    def go_on(self):
        """Let it do its next turn; the message of that."""
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self.expect()

    def last_errors(self):
        self.errors.seek(0)
        return self.errors.read()[-4000:]

    def end(self):
        self.child.kill()
        self.child.communicate()
        self.errors.close()


def tell(**message):
    """What a process says to the one that started it."""
    print(json.dumps(message), flush=True)


def timed(call, repeat=1):
    """Of a call: seconds, and CPU seconds of all threads, divided by how often it is repeated; and the peak in MB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(repeat):
        call()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds / repeat, "busy": busy / repeat, "peak": after.ru_maxrss / 1024}


def judge(what, ratio, bound, at_least=False):
    """Print a ratio beside its bound; whether it is missed."""
    missed = not (ratio >= bound if at_least else ratio <= bound)
    word = "at least" if at_least else "at most"
    print(f"{what:60} {ratio:7.3f}  {word} {bound:.3f}  {'MISSED' if missed else 'held'}", flush=True)
    return missed


def torchvision_module(torch):
    """torchvision; with an NMS of our own where its compiled part is for another torch (only NMS is needed of that)."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        def nms(boxes, scores, iou_threshold):  # with random weights hardly a box comes to it
            kept, order = [], scores.argsort(descending=True)
            while order.numel():
                kept.append(order[0])
                order = order[1:][torchvision.ops.box_iou(boxes[order[:1]], boxes[order[1:]])[0] <= iou_threshold]
            return torch.stack(kept) if kept else order

        torchvision.ops.boxes.nms = nms
        torchvision.library_of_nms = library  # else the definition goes
    return torchvision
