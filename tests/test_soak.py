"""A server asked by four clients at once, one request in twenty damaged: answers stay right, memory stays flat."""

import io
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import serving_double
from PIL import Image

from retinanet_keras.serving.conversation import Refused, connect

CLIENTS, ROUNDS = 4, 10


@pytest.fixture
def server(tiny_export):
    """(addresses, psutil.Process) of the double in a process of its own."""
    command = [sys.executable, serving_double.__file__, str(tiny_export), "shapes"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline()), psutil.Process(process.pid)
        process.stdin.close()
        assert process.wait(300) == 0


def encoded(number):
    """An image of 64 to 160 pixels a side; of the same number the same."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(64, 161, 2)
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), "uint8")).resize((int(width), int(height)), Image.BICUBIC)
    image.save(buffer, ("PNG", "JPEG")[number % 2])
    return buffer.getvalue()


def answers(server, tasks):
    """What one client gets for each (number, bytes): (number, outputs), or (number, None) where it is refused."""
    found = []
    with connect(server, "shapes") as ask:
        for number, data in tasks:
            try:
                found.append((number, ask("serving_bytes", {"image_bytes": [data]})))
            except Refused:
                found.append((number, None))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("requests", [40, 2000])
def test_four_clients_get_what_one_gets_and_memory_is_flat(server, requests):
    """Half of the clients speak REST. Memory is looked at in the long form alone: the short one is all warm-up."""
    addresses, process = server
    assert Path(serving_double.__file__).name in process.cmdline()[1]
    images = [encoded(number) for number in range(20)]
    alone = dict(answers(addresses["grpc"], enumerate(images)))
    assert all(one["num_detections"][0] > 0 for one in alone.values())
    chance = random.Random(0)
    damaged, tasks = set(chance.sample(range(requests), requests // 20)), []
    for place in range(requests):
        number = chance.randrange(len(images))
        data = images[number]
        tasks.append((None, data[: len(data) // 3]) if place in damaged else (number, data))
    memory, refused, share = [], 0, requests // ROUNDS
    with ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, requests, share):
            part = tasks[start : start + share]
            asked = [pool.submit(answers, addresses[("grpc", "rest")[i % 2]], part[i::CLIENTS]) for i in range(CLIENTS)]
            for client in asked:
                for number, outputs in client.result():
                    refused += number is None
                    assert (outputs is None) == (number is None)
                    for name, value in (outputs or {}).items():
                        np.testing.assert_array_equal(value, alone[number][name])
            memory.append(round(process.memory_info().rss / 2**20, 1))
    print(f"server's memory after each tenth, MB: {memory}")
    assert refused == len(damaged) and process.is_running()
    if requests >= 2000:
        assert max(memory[3:]) < 1.05 * memory[2]  # 600 requests warm up
