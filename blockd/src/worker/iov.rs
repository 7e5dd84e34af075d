//! Lists of buffers: cutting out a range, copying to and from memory of our own.

use libc::iovec;

use super::buffer::AlignedBuffer;

/// Total length in bytes.
pub fn total(iov: &[iovec]) -> u64 {
    iov.iter().map(|v| v.iov_len as u64).sum()
}

/// Appends to `out` the part `[start, start + len)` of what `iov` describes.
pub fn slice(iov: &[iovec], start: u64, len: u64, out: &mut Vec<iovec>) {
    let (mut skip, mut left) = (start, len);
    for v in iov {
        if left == 0 {
            return;
        }
        let n = v.iov_len as u64;
        if skip >= n {
            skip -= n;
            continue;
        }
        let take = (n - skip).min(left);
        // SAFETY: `skip + take` is within the buffer that `v` describes.
        let base = unsafe { v.iov_base.add(skip as usize) };
        out.push(iovec { iov_base: base, iov_len: take as usize });
        left -= take;
        skip = 0;
    }
    assert_eq!(left, 0, "a range beyond its buffers");
}

/// Whether all buffers begin on multiples of `align` and have lengths that are multiples of `len_align`. Direct I/O
/// asks for both: a disk that takes memory on 4 bytes still wants each buffer to hold whole sectors.
pub fn is_aligned(iov: &[iovec], align: usize, len_align: usize) -> bool {
    let aligned =
        |v: &iovec| (v.iov_base as usize).is_multiple_of(align) && v.iov_len.is_multiple_of(len_align);
    align <= 1 || iov.iter().all(aligned)
}

/// Fills `[start, start + len)` with zeroes.
pub fn zero(iov: &[iovec], start: u64, len: u64) {
    let mut parts = Vec::new();
    slice(iov, start, len, &mut parts);
    for v in parts {
        // SAFETY: guest memory that the request's snapshot keeps mapped; the guest may race with itself only.
        unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
    }
}

/// Copies the buffers' contents, in order, to the beginning of `to`.
pub fn gather(iov: &[iovec], to: &mut AlignedBuffer) {
    let mut at = 0;
    for v in iov {
        assert!(at + v.iov_len <= to.len());
        // SAFETY: `v` is guest memory kept mapped by the request, `to` has room (asserted), and they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(v.iov_base.cast::<u8>(), to.as_ptr().add(at), v.iov_len) };
        at += v.iov_len;
    }
}

/// Copies the beginning of `from` to the buffers, in order.
pub fn scatter(from: &AlignedBuffer, iov: &[iovec]) {
    let mut at = 0;
    for v in iov {
        assert!(at + v.iov_len <= from.len());
        // SAFETY: as in `gather`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(at), v.iov_base.cast::<u8>(), v.iov_len) };
        at += v.iov_len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(parts: &mut [Vec<u8>]) -> Vec<iovec> {
        parts.iter_mut().map(|p| iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect()
    }

    #[test]
    fn any_range_is_cut_out_exactly() {
        let mut parts = vec![vec![0u8; 3], vec![1; 5], vec![2; 1], vec![3; 7]];
        let iov = of(&mut parts);
        let flat: Vec<usize> =
            iov.iter().flat_map(|v| (0..v.iov_len).map(|i| v.iov_base as usize + i)).collect();
        for start in 0..=16 {
            for len in 0..=16 - start {
                let mut out = Vec::new();
                slice(&iov, start as u64, len as u64, &mut out);
                let got: Vec<usize> =
                    out.iter().flat_map(|v| (0..v.iov_len).map(|i| v.iov_base as usize + i)).collect();
                assert_eq!(got, flat[start..start + len]);
            }
        }
    }

    #[test]
    fn gather_and_scatter_are_inverse() {
        let mut a = vec![vec![1u8, 2, 3], vec![], vec![4, 5]];
        let mut buffer = AlignedBuffer::new(5);
        gather(&of(&mut a), &mut buffer);
        assert_eq!(&buffer.as_slice()[..5], [1, 2, 3, 4, 5]);
        let mut b = vec![vec![0u8; 1], vec![0; 4]];
        scatter(&buffer, &of(&mut b));
        assert_eq!(b, [vec![1], vec![2, 3, 4, 5]]);
        zero(&of(&mut b), 1, 3);
        assert_eq!(b, [vec![1], vec![0, 0, 0, 5]]);
    }
}
