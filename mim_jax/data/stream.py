"""tf.data iterators that end well although Python code runs inside them.

Records of array_record files and some image formats are read by Python in TensorFlow's threads. Two things go wrong then. If
the garbage collector happens to run in such a thread and destroys the iterator there, the thread waits for itself for ever.
And a thread that asks for the interpreter after it has shut down aborts the process.
"""

import atexit
import queue
import threading
import weakref

import tensorflow as tf

from mim_jax.data.augment import DataError

_retired = queue.SimpleQueue()  # its put may be called from the garbage collector
_live = weakref.WeakSet()
_lock = threading.Lock()
_undertaker = None


def mapped(ds, make):
    """In parallel, in the same order; `make` is not rewritten."""
    return ds.map(tf.autograph.experimental.do_not_convert(make), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def alike(ds, skip=0):
    """The dataset. Raises DataError unless its examples, after `skip` leading dimensions, are of one shape."""
    for key, of in ds.element_spec.items():
        if of.dtype == tf.string:
            raise DataError(f"{key!r} of the examples is text: data with objects is for job=detect.")
        if not of.shape[skip:].is_fully_defined():
            words = "a batch needs one shape for all: pad it in Source.load"
            raise DataError(f"{key!r} of the examples is {of.shape[skip:]}; {words}.")
    return ds


def _bury():
    while _retired.get() is not None:
        pass  # the iterator is destroyed here, in a thread that nobody waits for


class Stream:
    """The elements of a tf.data.Dataset as numpy arrays."""

    def __init__(self, dataset):
        global _undertaker
        with _lock:
            if _undertaker is None:
                _undertaker = threading.Thread(target=_bury, daemon=True, name="data-streams")
                _undertaker.start()
        self.spec = dataset.element_spec  # shapes and types
        self._iterator = dataset.as_numpy_iterator()
        _live.add(self)

    def next(self):
        """The next element, or None at the end. Raises what TensorFlow raises."""
        return next(self._iterator, None)

    def close(self):
        """Lets the iterator end, without waiting for it."""
        iterator, self._iterator = getattr(self, "_iterator", None), None
        if iterator is not None:
            _retired.put(iterator)

    __del__ = close


@atexit.register
def _close_all():
    for stream in list(_live):
        stream.close()
    if _undertaker is not None:
        _retired.put(None)
        _undertaker.join(30)
