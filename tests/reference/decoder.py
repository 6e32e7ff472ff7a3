"""A Llama-like decoder over one plain sequence, in float64, one query and one key at a time."""

import math

import numpy as np


def hidden_states(params, ids, layers, *, eps):
    """Final hidden states [T D].

    Args:
      params: nested dicts of arrays; those of layers lead with the layer.
      layers: of each layer a dict of window, theta, stretch (linear), scale, cap and activation; what is absent is off.
    """
    x = np.asarray(params["embedding"], np.float64)[ids]
    for i, layer in enumerate(layers):
        p = _select(params["layers"], i)
        x = x + _attention(_norm(x, p["attention_norm"]["scale"], eps), p["attention"], layer, eps)
        x = x + _mlp(_norm(x, p["mlp_norm"]["scale"], eps), p["mlp"], layer.get("activation", "silu"))
    return _norm(x, np.asarray(params["norm"]["scale"], np.float64), eps)


def logits(params, ids, layers, *, eps):
    """Next-token logits [T V]."""
    return hidden_states(params, ids, layers, eps=eps) @ np.asarray(params["head"], np.float64)


def _select(tree, i):
    return {k: _select(v, i) if isinstance(v, dict) else np.asarray(v[i], np.float64) for k, v in tree.items()}


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotated(vector, position, theta, stretch):
    """Component j and j + K/2 are one complex number."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for j in range(half):
        angle = position / stretch * theta ** (-2 * j / len(vector))
        turned = complex(vector[j], vector[j + half]) * complex(math.cos(angle), math.sin(angle))
        out[j], out[j + half] = turned.real, turned.imag
    return out


def _attention(x, p, layer, eps):
    heads, groups = p["q"].shape[1], p["k"].shape[1]
    theta, stretch = layer.get("theta", 1e4), layer.get("stretch", 1.0)

    def project(name, head):
        y = x @ p[name][:, head]
        if f"{name}_bias" in p:
            y = y + p[f"{name}_bias"][head]
        if name == "v":
            return y
        if f"{name}_norm" in p:
            y = _norm(y, p[f"{name}_norm"]["scale"], eps)
        return [_rotated(row, t, theta, stretch) for t, row in enumerate(y)]

    keys, values = ([project(name, g) for g in range(groups)] for name in ("k", "v"))
    out = np.zeros_like(x)
    for h in range(heads):
        queries, g = project("q", h), h // (heads // groups)
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if layer.get("window") is None or t - s < layer["window"]]
            scores = np.array([queries[t] @ keys[g][s] for s in seen])
            scores = scores * (layer["scale"] if layer.get("scale") is not None else 1 / math.sqrt(len(queries[t])))
            if layer.get("cap") is not None:
                scores = layer["cap"] * np.tanh(scores / layer["cap"])
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            out[t] += sum(w * values[g][s] for w, s in zip(weights, seen, strict=True)) @ p["o"][h]
    return out


def _mlp(x, p, activation):
    gate = x @ p["gate"]
    if activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gate * (x @ p["up"])) @ p["down"]
