//! What a connection counts.

use std::time::Duration;

/// What has happened on a connection since it was made. All values only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commands sent that want a reply.
    pub calls: u64,
    /// Commands sent that want none.
    pub posts: u64,
    /// Commands of the server that were answered, on both sockets.
    pub served: u64,
    /// Bytes sent on the main socket.
    pub bytes_sent: u64,
    /// Bytes received on the main socket.
    pub bytes_received: u64,
    /// Calls that were not answered in time.
    pub timeouts: u64,
    /// Calls that the server refused.
    pub refusals: u64,
    /// Calls whose answer broke the protocol.
    pub bad_answers: u64,
    /// Replies that no call waited for: late ones, or with an id that was never sent.
    pub strays: u64,
    /// How long answered calls took.
    pub latency: Histogram,
}

/// A histogram of durations, with a bucket for each power of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Bucket `i` counts durations of at least 2^i and less than 2^(i+1) nanoseconds. The first counts shorter ones
    /// too, the last, from 2^31 ns (2.1 s), longer ones.
    pub buckets: [u64; 32],
}

impl Histogram {
    /// How many durations there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// A duration in nanoseconds that this many percent of all were shorter than, at most twice as long as need be; 0 if
    /// there were none.
    pub fn percentile(&self, percent: u8) -> u64 {
        // Rounded up: the least that may be left out is nothing.
        let wanted = (u128::from(self.count()) * u128::from(percent.min(100))).div_ceil(100);
        let mut count = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            count += u128::from(*bucket);
            if count >= wanted && count > 0 {
                return 2 << index;
            }
        }
        0
    }

    pub(crate) fn record(&mut self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let last = self.buckets.len() - 1;
        let bucket = usize::try_from(nanoseconds.max(1).ilog2()).map_or(last, |log| log.min(last));
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_of_their_power_of_two() {
        let mut histogram = Histogram::default();
        for nanoseconds in [0, 1, 2, 3, 4, 1 << 31, u64::MAX] {
            histogram.record(Duration::from_nanos(nanoseconds));
        }
        let mut expected = [0; 32];
        (expected[0], expected[1], expected[2], expected[31]) = (2, 2, 1, 2);
        assert_eq!(histogram.buckets, expected);
    }

    #[test]
    fn percentiles_are_no_shorter_than_what_they_are_of() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), 0);
        for nanoseconds in [900; 99] {
            histogram.record(Duration::from_nanos(nanoseconds));
        }
        histogram.record(Duration::from_micros(100));
        assert_eq!(histogram.percentile(0), 1024);
        assert_eq!(histogram.percentile(50), 1024);
        assert_eq!(histogram.percentile(99), 1024);
        assert_eq!(histogram.percentile(100), 131_072);
    }
}
