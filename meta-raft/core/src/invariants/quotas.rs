//! A quota's usage is the sum of what is charged to it.

use std::collections::BTreeMap;

use heliofs_proto::ids::Ino;
use heliofs_proto::v1::QuotaKind;

use super::{Found, Records};
use crate::ops::charge::is_counted;
use crate::records::Accounting;

const DIRECTORY: u64 = QuotaKind::Directory as u64;
const USER: u64 = QuotaKind::User as u64;
const GROUP: u64 = QuotaKind::Group as u64;

pub(super) fn check(records: &Records, found: &mut Found) {
    let counters = &records.counters.quotas;
    let mut sums: BTreeMap<(u64, u64), (u64, u64)> = BTreeMap::new();
    let mut add = |kind, id, bytes| {
        let sum = sums.entry((kind, id)).or_default();
        sum.0 += bytes;
        sum.1 += 1;
    };
    for (ino, inode) in &records.inodes {
        if inode.is_snapshot() {
            continue;
        }
        if is_counted(counters, *ino) {
            add(USER, inode.uid.into(), inode.allocated);
            add(GROUP, inode.gid.into(), inode.allocated);
        }
        let mut at = inode.quota;
        // No chain is longer than there are quotas.
        for _ in 0..=records.quotas.len() {
            if at == Ino(0) {
                break;
            }
            let quota = records.quotas.get(&(DIRECTORY, at.0));
            found.expect(quota.is_some(), || {
                format!("inode {ino} is charged to quota {at}, which does not exist")
            });
            add(DIRECTORY, at.0, inode.allocated);
            at = quota.map_or(Ino(0), |quota| quota.parent);
        }
        found.expect(at == Ino(0), || {
            format!("the quotas above inode {ino} form a circle")
        });
    }

    let (mut directories, mut limited) = (0, 0);
    for ((kind, id), quota) in &records.quotas {
        let sum = sums.remove(&(*kind, *id)).unwrap_or_default();
        // What was counted is being forgotten.
        let forgotten = *kind != DIRECTORY && counters.accounting == Accounting::Clearing;
        found.expect(
            forgotten || (quota.used_bytes, quota.used_inodes) == sum,
            || {
                format!(
                    "quota {kind}/{id} counts {} bytes and {} inodes, {sum:?} are charged to it",
                    quota.used_bytes, quota.used_inodes
                )
            },
        );
        let walks = records
            .quota_walks
            .range((Ino(*id), Ino(0))..=(Ino(*id), Ino(u64::MAX)));
        let walked = *kind == DIRECTORY && walks.count() > 0;
        found.expect(walked == quota.is_walked(), || {
            format!(
                "quota {kind}/{id} is {:?}, and its walk is not",
                quota.state
            )
        });
        directories += u64::from(*kind == DIRECTORY);
        limited += u64::from(*kind != DIRECTORY && quota.is_limited());
        found.expect([DIRECTORY, USER, GROUP].contains(kind), || {
            format!("quota {kind}/{id} is of no kind")
        });
    }
    found.expect(sums.is_empty(), || {
        format!("charged and not counted: {sums:?}")
    });
    found.expect(
        (counters.directories, counters.limited_owners) == (directories, limited),
        || format!("{counters:?}, there are {directories} and {limited}"),
    );
    found.expect(
        (counters.accounting == Accounting::Counting || counters.counted_to == Ino(0))
            && (limited > 0)
                == matches!(counters.accounting, Accounting::Counting | Accounting::On),
        || format!("{counters:?} with {limited} limits"),
    );
}
