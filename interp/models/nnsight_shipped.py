"""What a trace that runs elsewhere brings along: plain functions of torch and of nothing else.

nnsight sends them by their source, so they have no annotations and use no name of this package.
"""

import torch

NAMES = ("hidden_states", "x", "hidden_state", "input")


def arguments(args, kwargs, masks):
    """The arguments of an operation, tensors on the CPU, other objects by their kind only.

    A mask that several layers share is sent once: later ones are its number in `masks`.
    """
    four = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 4]

    def sent(x):
        if not isinstance(x, torch.Tensor):
            plain = x is None or isinstance(x, (bool, int, float, str))
            return x if plain else "a " + type(x).__name__
        if any(x is mask for mask in four[3:]):
            for number, mask in enumerate(masks):
                if mask is x:
                    return ("mask", number)
            masks.append(x)
        return x.detach().cpu()

    return [sent(x) for x in args], {name: sent(x) for name, x in kwargs.items()}


def play(root, steps, masks):
    """Visit places in the order the model reaches them; keep and replace what is asked.

    `steps` are tuples (number, path, side, whether to keep the value, what replaces it or None);
    a side other than "input" and "output" is an operation inside the module's forward.
    """
    kept = {}
    for number, path, side, keep, new in steps:
        envoy = root.get(path)
        if side == "output":
            output = envoy.output
            x = output if isinstance(output, torch.Tensor) else output[0]
            if new is not None:
                moved = new.to(x.device)
                envoy.output = moved if isinstance(output, torch.Tensor) else (moved, *output[1:])
        elif side == "input":
            args, kwargs = envoy.inputs
            name = None if args else next(n for n in NAMES if n in kwargs)
            x = args[0] if args else kwargs[name]
            if new is not None and args:
                envoy.inputs = (new.to(x.device), *args[1:]), kwargs
            elif new is not None:
                envoy.inputs = args, {**kwargs, name: new.to(x.device)}
        else:
            operation = getattr(envoy.source, side)
            args, kwargs = operation.inputs
            if keep:
                kept[number] = arguments(args, kwargs, masks)
            if new is not None:
                z, wrapped = new
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                z = z.to(tensors[0].device) if tensors else z
                operation.skip((z, None) if wrapped else z)
            continue
        if keep:
            kept[number] = x.detach().cpu()
    return kept
