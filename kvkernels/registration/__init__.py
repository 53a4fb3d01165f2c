"""Makes the ops of torch.ops.kvkernels: schemas, the compiled library or the reference, fake kernels, lazy bits.

They exist once this is imported.
"""

from kvkernels.registration import fake, lazy_bits, schemas
from kvkernels.registration.library import LIBRARY, build_record

__all__ = ["LIBRARY", "build_record", "fake", "lazy_bits", "schemas"]
