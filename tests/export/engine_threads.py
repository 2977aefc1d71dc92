"""Several readers of one engine, in several threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tiny import tokens


def at_once(make_reader, engine, method, state):
    """Lets two readers answer at the same time, and checks that `engine.method` runs only once at a time."""
    inside, most, call = [], [], getattr(engine, method)

    def slow(*args, **options):
        inside.append(threading.get_ident())
        most.append(len(set(inside)))
        time.sleep(0.05)
        try:
            return call(*args, **options)
        finally:
            inside.remove(threading.get_ident())

    setattr(engine, method, slow)
    options = {"memory": state, "max_new_tokens": 2, "do_sample": False}
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(make_reader().generate, tokens(1, 4), **options) for _ in range(2)]
        rows = [answer.result().tolist() for answer in answers]
    assert rows[0] == rows[1]
    assert max(most) == 1
