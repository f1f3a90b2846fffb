"""A federated application of one's own, which digits.toml brings along.

It is the body of Flower's PyTorch quickstart, moved over: `Net`, `load_data`, `fit` and `judge` are any
training code, and only what is decorated is Mycel's.
"""

import numpy as np
import torch

import mycel

app = mycel.App()


class Net(torch.nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.hidden = torch.nn.Linear(features, 64)
        self.out = torch.nn.Linear(64, classes)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def load_data(path):
    found = np.load(path)
    return torch.from_numpy(found["x"]).float(), torch.from_numpy(found["y"])


def fit(net, x, y, epochs, rate):
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def judge(net, x, y):
    with torch.no_grad():
        scores = net(x)
    right = (scores.argmax(1) == y).float().mean()
    return torch.nn.functional.cross_entropy(scores, y).item(), right.item()


def net_of(settings):
    return Net(settings["features"], settings["classes"])


def data_of(task):  # read once: the cache lives as long as the job
    if "data" not in task.cache:
        task.cache["data"] = load_data(task.data)
    return task.cache["data"]


@app.start
def start(task):  # the first model; the same from the same seed
    torch.manual_seed(task.seed)
    return net_of(task.settings)


@app.train
def train(task):
    net, (x, y) = task.load(net_of(task.settings)), data_of(task)
    loss = fit(net, x, y, task.settings["local-epochs"], task.settings["rate"])
    return task.done(net, examples=len(x), loss=loss)


@app.evaluate
def evaluate(task):
    net, (x, y) = task.load(net_of(task.settings)), data_of(task)
    loss, accuracy = judge(net, x, y)
    return task.judged(examples=len(x), loss=loss, accuracy=accuracy)
