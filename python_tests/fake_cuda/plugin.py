"""``pytest -p fake_cuda.plugin``: the tests of a GPU on the fake one."""

from fake_cuda.runtime import install

install()
