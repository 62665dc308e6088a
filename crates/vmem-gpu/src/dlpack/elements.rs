//! What the bytes of a tensor are: the type of its elements, and its shape.
//!
//! Invariant: elements are whole bytes, and as many as the memory has; no number of a shape that
//! was checked overflows. Called by tensors that go out and by those that come in.

use dlpack_rs::ffi::DLDataType;
use dlpack_rs::safe;
use vmem_core::VirtualMemoryError;

use super::Result;

/// More dimensions than any library has.
const DIMENSIONS_MAX: usize = 64;

/// The type and the shape of a tensor, the last dimension innermost.
#[derive(Debug)]
pub(super) struct Elements {
    pub(super) dtype: DLDataType,
    pub(super) shape: Vec<i64>,
    /// In elements.
    pub(super) strides: Vec<i64>,
}

impl Elements {
    /// Plain bytes. Their number fits: it is that of memory.
    pub(super) fn bytes(len: usize) -> Self {
        Elements { dtype: safe::dtype_u8(), shape: vec![len as i64], strides: vec![1] }
    }

    /// Elements of this type in this shape, over `len` bytes.
    ///
    /// # Errors
    ///
    /// `InvalidConfig`.
    pub(super) fn new(dtype: DLDataType, shape: &[usize], len: usize) -> Result<Self> {
        let bytes = bytes_of(dtype, shape)?;
        if bytes != len {
            let reason = format!("a tensor of {bytes} bytes over a lease of {len}");
            return Err(invalid(reason));
        }
        // They fit, as the bytes do.
        let strides = row_major(shape).into_iter().map(|stride| stride as i64).collect();
        let shape = shape.iter().map(|&length| length as i64).collect();
        Ok(Elements { dtype, shape, strides })
    }
}

/// The length of a tensor, in bytes.
///
/// # Errors
///
/// `InvalidConfig` if an element is not whole bytes, or any number of it does not fit.
pub(super) fn bytes_of(dtype: DLDataType, shape: &[usize]) -> Result<usize> {
    let bits = usize::from(dtype.bits) * usize::from(dtype.lanes);
    if bits == 0 || !bits.is_multiple_of(8) {
        return Err(invalid(format!("elements of {bits} bits, which are not whole bytes")));
    }
    if shape.len() > DIMENSIONS_MAX {
        return Err(invalid(format!("{} dimensions", shape.len())));
    }
    // With lengths of 0 as 1, so that the strides fit too.
    let mut lengths = shape.iter().map(|&length| length.max(1));
    let bytes = lengths.try_fold(bits / 8, usize::checked_mul);
    match bytes.filter(|&bytes| i64::try_from(bytes).is_ok()) {
        Some(_) if shape.contains(&0) => Ok(0),
        Some(bytes) => Ok(bytes),
        None => Err(invalid(format!("a shape of {shape:?}, which does not fit into memory"))),
    }
}

/// How far apart neighbours of each dimension are, in elements, of a shape that was checked.
pub(super) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at].max(1);
    }
    strides
}

pub(super) fn invalid(reason: String) -> VirtualMemoryError {
    VirtualMemoryError::invalid_config("tensor", reason)
}

#[cfg(test)]
mod tests {
    use dlpack_rs::ffi::DLDataTypeCode;

    use super::super::dtype;
    use super::*;

    #[test]
    fn shapes_have_their_bytes_or_are_refused() {
        let half = dtype(DLDataTypeCode::kDLFloat, 16);
        assert_eq!(bytes_of(half, &[3, 4, 5]).unwrap(), 120);
        assert_eq!(bytes_of(half, &[]).unwrap(), 2, "a scalar");
        assert_eq!(bytes_of(half, &[7, 0, 3]).unwrap(), 0);
        let pair = DLDataType { lanes: 2, ..dtype(DLDataTypeCode::kDLFloat4_e2m1fn, 4) };
        assert_eq!(bytes_of(pair, &[10]).unwrap(), 10);
        let refused = [
            (dtype(DLDataTypeCode::kDLFloat4_e2m1fn, 4), vec![10]),
            (dtype(DLDataTypeCode::kDLFloat, 0), vec![10]),
            (DLDataType { lanes: 0, ..half }, vec![10]),
            (half, vec![usize::MAX / 2, 2]),
            (half, vec![1 << 62]),
            (half, vec![1 << 40, 0, 1 << 40]),
            (half, vec![1; DIMENSIONS_MAX + 1]),
        ];
        for (dtype, shape) in refused {
            bytes_of(dtype, &shape).unwrap_err();
        }
    }

    #[test]
    fn the_last_dimension_is_innermost() {
        assert_eq!(row_major(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(row_major(&[2, 0, 4]), [4, 4, 1]);
        assert_eq!(row_major(&[]), [0; 0]);
    }
}
