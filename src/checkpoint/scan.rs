//! Reads a checkpoint's data once, when it is opened: scales, zero points, `g_idx`, biases, norms and tables.
//!
//! The codes are left alone (any bits are valid). Falcon-7B with F32 tables has 2.6 GB to read; from a warm page
//! cache that is bound by page faults and memory, so the work is cut into jobs for a few threads. The first error in
//! the order of the jobs is reported, so a damaged file always gets the same message.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::container::{Container, Place};
use super::float::FloatTensor;
use super::gptq::{Matrix, MatrixFacts, bad_value, check_values};
use crate::error::Result;

/// Enough to saturate a host's memory; more only take longer to start.
const MAX_THREADS: usize = 8;
/// Bytes of a table that one job reads.
const TABLE_BLOCK_BYTES: usize = 8 << 20;

/// `work(0), ..., work(jobs - 1)`, computed by a few threads.
fn in_parallel<T: Send>(jobs: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(jobs);
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            if job >= jobs {
                return done;
            }
            done.push((job, work(job)));
        }
    };
    let mut done = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let join =
            |w: thread::ScopedJoinHandle<'_, _>| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        workers.into_iter().flat_map(join).collect::<Vec<_>>()
    });
    done.sort_unstable_by_key(|(job, _)| *job);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The facts of each matrix, in order.
pub(crate) fn scan_matrices(
    container: &Container,
    matrices: &[&Matrix],
    desc_act: Option<bool>,
) -> Result<Vec<MatrixFacts>> {
    in_parallel(matrices.len(), |i| matrices[i].scan(container, desc_act)).into_iter().collect()
}

/// Norms are kept in single precision, so they need only be finite.
pub(crate) fn scan_norms(container: &Container, norms: &[(String, &Place)]) -> Result<()> {
    norms
        .iter()
        .try_for_each(|(name, place)| check_values(container, name, container.float_view(place), false))
}

/// Checks the embedding and, if there is one, `lm_head`: both are [vocab_size, hidden_size]. Whether `lm_head` is the
/// embedding once more.
pub(crate) fn scan_tables(
    container: &Container,
    (embedding_name, embedding): (&str, &Place),
    lm_head: Option<(&str, &Place)>,
) -> Result<bool> {
    let embedding = container.float_view(embedding);
    let lm_head = lm_head.map(|(name, place)| (name, container.float_view(place)));
    let [rows, cols] = embedding.shape;
    let rows_per_job = (TABLE_BLOCK_BYTES / (cols * embedding.dtype.size())).max(1);
    let results = in_parallel(rows.div_ceil(rows_per_job), |job| {
        let first = job * rows_per_job;
        let block = |t: FloatTensor<'_>, name: &str| {
            let part = t.rows(first, rows_per_job.min(rows - first));
            let bad = part.first_bad(true).map(|i| first * cols + i);
            bad.map_or(Ok(()), |i| Err(bad_value(container, name, t.shape, i, t.get(i))))
        };
        block(embedding, embedding_name)?;
        let Some((name, lm_head)) = lm_head else { return Ok(true) };
        let count = rows_per_job.min(rows - first);
        if lm_head.rows(first, count).same_in_f16(&embedding.rows(first, count)) {
            return Ok(true);
        }
        block(lm_head, name).map(|()| false)
    });
    let same: Result<Vec<bool>> = results.into_iter().collect();
    Ok(same?.into_iter().all(|same| same))
}
