"""One thread for every matrix product: the products of the tests are small, and handing them around costs more than they do."""
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
