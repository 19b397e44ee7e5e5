//! Read buffers that are used again: fresh ones cost a page fault for every
//! page that is read into them.

#[derive(Debug)]
pub(crate) struct BufferPool {
    idle: Vec<Vec<u8>>,
    idle_bytes: usize,
    /// Most bytes to keep while they are not in use.
    keep: usize,
}

impl BufferPool {
    pub(crate) fn new(keep: usize) -> Self {
        Self { idle: Vec::new(), idle_bytes: 0, keep }
    }

    /// A buffer of `len` bytes with arbitrary contents: the smallest idle one
    /// that is large enough.
    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let fitting = (0..self.idle.len())
            .filter(|&i| self.idle[i].capacity() >= len)
            .min_by_key(|&i| self.idle[i].capacity());
        let Some(index) = fitting else { return vec![0; len] };
        let mut buf = self.idle.swap_remove(index);
        self.idle_bytes -= buf.capacity();
        buf.resize(len, 0);
        buf
    }

    /// Takes a buffer back, or frees it if enough are idle.
    pub(crate) fn give(&mut self, buf: Vec<u8>) {
        if self.idle_bytes + buf.capacity() <= self.keep {
            self.idle_bytes += buf.capacity();
            self.idle.push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_fitting_buffer_is_used_again() {
        let mut pool = BufferPool::new(100_000);
        let (small, large) = (pool.take(4096), pool.take(65536));
        let (at_small, at_large) = (small.as_ptr(), large.as_ptr());
        pool.give(large);
        pool.give(small);
        let small = pool.take(4000);
        assert_eq!((small.as_ptr(), small.len()), (at_small, 4000));
        let large = pool.take(5000);
        assert_eq!((large.as_ptr(), large.len()), (at_large, 5000));
    }

    #[test]
    fn idle_bytes_are_bounded() {
        let mut pool = BufferPool::new(10_000);
        for _ in 0..10 {
            pool.give(vec![0; 4096]);
        }
        assert_eq!((pool.idle.len(), pool.idle_bytes), (2, 8192));
    }
}
