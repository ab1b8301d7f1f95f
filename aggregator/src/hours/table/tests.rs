use serde_json::json;
use tributary_common::ids::StreamId;
use tributary_common::report::StreamOffset;

use super::*;
use crate::root::ledger::{AgentCount, Lost, Missing, SealedFile};

const HOUR: i64 = 3600;
/// 2026-11-22T20, in hours since 1970.
const EVENING: i64 = 1_795_377_600 / HOUR;

fn category() -> CategoryName {
    "app".parse().expect("valid")
}

fn lanes(count: u16) -> LaneCount {
    count.try_into().expect("valid")
}

fn key(hour: i64) -> Key {
    key_of(&category(), &open(hour)).expect("there is such an hour")
}

fn open(hour: i64) -> OpenHour {
    OpenHour {
        bucket_start_s: hour * HOUR,
        bucket_size_s: 3600,
        over: true,
        sealed: false,
        records: 0,
        bytes: 0,
        files: 0,
        waiting_for: 0,
        agents: Vec::new(),
        waited_in_vain_s: 0,
    }
}

fn waited_for(host: &str) -> WaitedFor {
    WaitedFor {
        agent: format!("id-of-{host}").parse().expect("valid"),
        host: host.into(),
        behind_ms: Some(0),
        silent_ms: 0,
        uncommitted_streams: 0,
        uncommitted_bytes: 0,
        reason: String::new(),
    }
}

fn lane(epoch: u64, hours: Vec<OpenHour>) -> LaneStatus {
    let open = OpenHours { hours, left_out: None };
    LaneStatus { epoch: Epoch(epoch), open_hours: BTreeMap::from([(category(), open)]) }
}

fn seal(lane: u16, hour: i64, records: u64) -> Seal {
    let file = SealedFile {
        source: "join-1.gz".into(),
        name: format!("l{lane}.gz"),
        bytes: records * 10,
        crc32c: Default::default(),
        records,
    };
    Seal {
        version: 1,
        lane: LaneId(lane),
        category: category(),
        bucket_start_s: hour * HOUR,
        bucket_size_s: 3600,
        files: vec![file],
        inputs: Vec::new(),
        agents: BTreeMap::from([("web-1".parse().expect("valid"), AgentCount { records, bytes: records * 100 })]),
        losses: Vec::new(),
        missing: Vec::new(),
        publish_partial: false,
    }
}

fn manifest(hour: i64) -> Manifest {
    let size = tributary_common::bucket::BucketSize::HOUR;
    let key = crate::root::ledger::HourKey { category: category(), bucket: size.bucket_of_ms(hour * HOUR * 1000) };
    Manifest::of(&key, &[seal(0, hour, 7)])
}

fn text(table: &Table) -> String {
    let mut out = Vec::new();
    table.show(&mut out).expect("writes to memory");
    String::from_utf8(out).expect("text")
}

fn show(lanes: &BTreeMap<LaneId, LaneStatus>, sink: OnSink) -> Table {
    Table::new(LaneCount::try_from(2).expect("valid"), lanes, sink, None)
}

#[test]
fn an_open_hour_has_what_the_lanes_have_of_it_also_those_that_have_sealed_it() {
    let waiting = OpenHour {
        records: 5,
        bytes: 50,
        waiting_for: 1,
        agents: vec![waited_for("web-1")],
        waited_in_vain_s: 60,
        ..open(EVENING)
    };
    // The lane doesn't know any more what it sealed; the seal in the hour's directory does.
    let sealed = OpenHour { sealed: true, ..open(EVENING) };
    let said = BTreeMap::from([(LaneId(0), lane(1, vec![waiting.clone()])), (LaneId(1), lane(1, vec![sealed]))]);
    let unpublished = Unpublished { seals: vec![seal(1, EVENING, 7)], problem: None };
    let table = show(&said, OnSink { unpublished: [(key(EVENING), unpublished)].into(), ..OnSink::default() });
    let [hour] = table.hours.as_slice() else { panic!("{table:?}") };
    assert_eq!((hour.state, hour.records, hour.bytes, hour.files), (State::Open, 12, 120, Some(1)));
    assert_eq!((hour.sealed_by.as_slice(), hour.waiting_for, hour.waited_in_vain_s), ([LaneId(1)].as_slice(), 1, 60));
    assert!(
        text(&table).contains("waits for web-1 (heard 0s ago, past the hour); sealed by lane 1"),
        "{}",
        text(&table)
    );

    // One that has announced its seal says itself what is on its way.
    let announced = OpenHour { sealed: true, records: 7, bytes: 70, files: 1, ..open(EVENING) };
    let said = BTreeMap::from([(LaneId(0), lane(1, vec![waiting])), (LaneId(1), lane(1, vec![announced]))]);
    let again = show(&said, OnSink::default());
    assert_eq!(again.hours, table.hours);
}

#[test]
fn an_hour_is_listed_from_its_last_seal_until_it_is_published() {
    let sealed = OpenHour { sealed: true, ..open(EVENING) };
    let said: BTreeMap<_, _> = [0, 1].map(|id| (LaneId(id), lane(1, vec![sealed.clone()]))).into();
    let unpublished = Unpublished { seals: vec![seal(0, EVENING, 7), seal(1, EVENING, 8)], problem: None };
    let table = show(&said, OnSink { unpublished: [(key(EVENING), unpublished)].into(), ..OnSink::default() });
    assert_eq!((table.hours.len(), table.hours[0].records, table.hours[0].files), (1, 15, Some(2)));
    assert!(text(&table).contains("is being put together"), "{}", text(&table));
}

#[test]
fn a_published_hour_is_what_readers_see_whatever_a_root_said_of_it_before() {
    let said = BTreeMap::from([(LaneId(0), lane(1, vec![open(EVENING), open(EVENING + 1)]))]);
    let hour = Hour::published(&key(EVENING), &manifest(EVENING));
    // The other one ended too long ago to be shown, and a lane has late data of it.
    let published = [(key(EVENING), Some(hour.clone())), (key(EVENING + 1), None)].into();
    let table = show(&said, OnSink { published, ..OnSink::default() });
    assert_eq!(table.hours, [hour]);
    assert_eq!((table.hours[0].state, table.hours[0].sealed_by.as_slice()), (State::Complete, [LaneId(0)].as_slice()));
}

#[test]
fn of_two_roots_that_answer_for_a_lane_the_one_with_the_higher_epoch_is_believed() {
    let answer = |epoch: u64, records: u64| {
        let status = lane(epoch, vec![OpenHour { records, ..open(EVENING) }]);
        json!({ "lanes": { "0": { "epoch": epoch, "open_hours": status.open_hours, "streams": 3 }, "1": { "state": "elsewhere" } } })
    };
    for answers in [[answer(9, 1), answer(10, 2)], [answer(10, 2), answer(9, 1)]] {
        let (lanes, strange) = lanes_of(&answers);
        assert_eq!(lanes, BTreeMap::from([(LaneId(0), lane(10, vec![OpenHour { records: 2, ..open(EVENING) }]))]));
        assert!(strange.is_empty(), "{strange:?}");
    }
}

#[test]
fn a_root_that_speaks_another_way_is_named_and_the_others_are_believed() {
    let good = json!({ "lanes": { "0": { "epoch": 1, "open_hours": {} } } });
    let other = json!({ "lanes": { "1": { "epoch": 1, "open_hours": { "app": [] } } } });
    let (lanes, strange) = lanes_of(&[other, good]);
    assert_eq!(lanes.keys().collect::<Vec<_>>(), [&LaneId(0)]);
    assert!(strange.len() == 1 && strange[0].contains("lane 1"), "{strange:?}");
    assert!(!show(&lanes, OnSink::default()).is_whole());
}

#[test]
fn an_agent_is_shown_with_how_long_it_is_silent_how_far_it_is_behind_and_what_of_it_is_not_stored() {
    let dead = WaitedFor { behind_ms: Some(5000), silent_ms: 3 * 86_400_000, ..waited_for("web-1") };
    let stuck = WaitedFor {
        silent_ms: 2000,
        uncommitted_streams: 3,
        uncommitted_bytes: 52_000,
        reason: "its edge is full".into(),
        ..waited_for("web-2")
    };
    let mute = WaitedFor { behind_ms: None, silent_ms: 600_000, ..waited_for("web-3") };
    for (agent, expected) in [
        (&dead, "web-1 (heard 3d ago, 5s behind)"),
        (&stuck, "web-2 (heard 2s ago, past the hour, 52000 bytes of 3 files not stored, its edge is full)"),
        (&mute, "web-3 (heard 10m ago, has not said how far it is)"),
    ] {
        assert_eq!(Agent::waited_for(agent).describe(), expected);
    }
    let agents: Vec<WaitedFor> =
        std::iter::once(dead).chain((2..=20).map(|n| waited_for(&format!("web-{n}")))).collect();
    let hour = OpenHour { waiting_for: 300, agents, ..open(EVENING) };
    let table = show(&BTreeMap::from([(LaneId(0), lane(1, vec![hour]))]), OnSink::default());
    assert!(text(&table).contains(", 295 more;"), "{}", text(&table));
    let json = serde_json::to_value(&table).expect("plain data");
    let first = &json["hours"][0]["agents"][0];
    assert_eq!((&first["silent_ms"], &first["behind_ms"]), (&json!(3 * 86_400_000), &json!(5000)));
    assert_eq!(json["hours"][0]["waiting_for"], 300);
}

#[test]
fn an_hour_that_is_not_over_waits_for_nobody() {
    let hour = OpenHour { over: false, waiting_for: 1, agents: vec![waited_for("web-1")], ..open(EVENING) };
    let said: BTreeMap<_, _> = [0, 1].map(|id| (LaneId(id), lane(1, vec![hour.clone()]))).into();
    let table = show(&said, OnSink::default());
    assert_eq!((table.hours[0].waiting_for, table.hours[0].over), (0, false));
    assert!(text(&table).ends_with("it is not over\n"), "{}", text(&table));
}

#[test]
fn an_hour_names_the_lanes_of_which_nothing_is_known_and_what_they_leave_out_is_counted() {
    let left_out = LeftOut { hours: 9, from_s: (EVENING - 9) * HOUR, to_s: (EVENING - 1) * HOUR };
    let mut first = lane(1, vec![open(EVENING)]);
    first.open_hours.get_mut(&category()).expect("there").left_out = Some(left_out);
    let said = BTreeMap::from([(LaneId(0), first), (LaneId(1), lane(1, vec![open(EVENING - 2), open(EVENING)]))]);
    // The third lane was not asked.
    let table = Table::new(lanes(3), &said, OnSink::default(), None);
    let unknown: Vec<&[LaneId]> = table.hours.iter().map(|hour| hour.lanes_unknown.as_slice()).collect();
    assert_eq!(unknown, [[LaneId(0), LaneId(2)].as_slice(), [LaneId(2)].as_slice()]);
    assert_eq!(table.lanes_not_asked, [LaneId(2)]);
    let text = text(&table);
    assert!(text.contains("app: lane 0 has 9 more open hours, from 2026-11-22T11:00 to 2026-11-22T19:00\n"), "{text}");
    assert!(text.contains("nothing is known of lanes 0, 2"), "{text}");
}

#[test]
fn each_state_has_its_line() {
    let mut partial = manifest(EVENING + 1);
    partial.complete = false;
    partial.missing = vec![Missing {
        agent: "id-2".parse().expect("valid"),
        host: "web-2".into(),
        watermark_ms: Some((EVENING + 1) * HOUR * 1000),
        offsets: vec![StreamOffset { stream: StreamId(1), offset: 9 }],
    }];
    let mut lossy = manifest(EVENING);
    lossy.losses = vec![Lost { agent: "id-2".parse().expect("valid"), stream: StreamId(1), from: 5, to: 9 }];
    let late = Late { records: 3, bytes: 30, files: 1 };
    let published = [
        Hour { late, ..Hour::published(&key(EVENING), &lossy) },
        Hour::published(&key(EVENING + 1), &partial),
        Hour { late, ..Hour::late(&key(EVENING + 2), Some(3600)) },
        Hour::unreadable(&key(EVENING + 3), "_MANIFEST.json: it is torn".into()),
    ];
    let published = published
        .into_iter()
        .map(|hour| ((hour.category.clone(), hour.bucket_start_s, hour.directory.clone()), Some(hour)));
    let said: BTreeMap<_, _> = [0, 1].map(|id| (LaneId(id), lane(1, vec![open(EVENING + 4)]))).into();
    let table = show(&said, OnSink { published: published.collect(), ..OnSink::default() });
    assert_eq!(
        text(&table),
        "\
CATEGORY             HOUR              STATE           RECORDS           BYTES  FILES       LATE
app                  2026-11-22T20:00  complete              7              70      1          3  4 bytes are lost
app                  2026-11-22T21:00  partial               7              70      1          -  lacks web-2 (60m behind, 1 files not stored)
app                  2026-11-22T22:00  late                  0               0      -          3
app                  2026-11-22T23:00  unreadable            0               0      -          -  _MANIFEST.json: it is torn
app                  2026-11-23T00:00  open                  0               0      -          -  is being put together
"
    );
    assert!(!table.is_whole(), "one can't be read");
}
