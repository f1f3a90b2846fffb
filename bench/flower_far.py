"""A Flower app, server's side and client's side, as bench/flower.py has Flower run it.

The server's side waits until all nodes are there, runs Flower's own FedAvg, and writes for every round the
seconds from the end of the round before to its own, judging left out, and the accuracy after it. A client
trains by `flower_digits`. Runs in Flower's interpreter, from a bundle that holds this file and that one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flower_digits import accuracy, examples, layers_of, seed_of, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train_here(message: Message, context: Context) -> Message:
    """One round's work of a client."""
    settings, node = context.run_config, context.node_config
    arrays = [array.copy() for array in message.content["arrays"].to_numpy_ndarrays()]
    x, y = examples(str(node["data"]), float(settings["scale"]))
    seed = seed_of(int(settings["seed"]), int(message.content["config"]["server-round"]), str(node["name"]))
    loss = train(layers_of(arrays), x, y, settings, seed)
    figures = MetricRecord({"num-examples": len(x), "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": figures}), reply_to=message)


@server_app.main()
def run_rounds(grid: Grid, context: Context) -> None:
    """All rounds, and what they took."""
    config = context.run_config
    clients, rounds = int(config["clients"]), int(config["rounds"])
    with np.load(str(config["model"])) as found:
        first = ArrayRecord([found[name] for name in sorted(found)])
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.2)
    report = Path(str(config["report"]))
    began, seconds, accuracies = 0.0, [], []

    def judge(number: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal began
        took = time.monotonic() - began
        layers = layers_of(arrays.to_numpy_ndarrays())
        right = accuracy(layers, str(config["judge"]), float(config["scale"]))
        if number:
            seconds.append(took)
            accuracies.append(right)
            part = report.with_suffix(".part")
            part.write_text(json.dumps({"seconds": seconds, "accuracies": accuracies}))
            part.rename(report)
        began = time.monotonic()
        return MetricRecord({"accuracy": right})

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid=grid, initial_arrays=first, num_rounds=rounds, evaluate_fn=judge)
