//! Charts as one SVG: groups of bars with whiskers from the least to the most, and a line where the target is.
//!
//! Colours are of middling lightness, so that they stand out on white and on black; text and lines take the reader's own
//! scheme (`prefers-color-scheme`), and the background is a card of its own.

use std::fmt::Write;

use crate::spread::{Bound, Spread};
use crate::table::number;

/// Bars that stand together.
#[derive(Debug, Clone)]
pub struct Group {
    /// Below the bars; may have two lines.
    pub label: String,
    /// One for each series; none where there is no figure.
    pub bars: Vec<Option<Spread>>,
    /// Where the target is.
    pub bound: Bound,
}

/// One chart.
#[derive(Debug, Clone)]
pub struct Chart {
    title: String,
    axis: String,
    series: Vec<String>,
    groups: Vec<Group>,
}

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TITLE: f64 = 62.0;
const PLOT: f64 = 220.0;
const LABELS: f64 = 52.0;
const CHART: f64 = TITLE + PLOT + LABELS;
/// Told apart by those who see few colours, too (after Okabe and Ito).
const COLOURS: [&str; 4] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"];

impl Chart {
    /// A chart of these groups; `None` when there is nothing to draw.
    pub fn new(
        title: impl Into<String>,
        axis: impl Into<String>,
        series: Vec<String>,
        mut groups: Vec<Group>,
    ) -> Option<Self> {
        groups.retain(|group| group.bars.iter().any(Option::is_some));
        (!groups.is_empty()).then(|| Self { title: title.into(), axis: axis.into(), series, groups })
    }

    /// Where the axis ends: beyond every bar and target. A whisker far above all bars is cut off and says so.
    fn top(&self) -> f64 {
        let bars = self.groups.iter().flat_map(|group| group.bars.iter().flatten());
        let (median, most) = bars
            .fold((0.0, 0.0), |(median, most): (f64, f64), bar| (median.max(bar.median), most.max(bar.most)));
        let bounds = self.groups.iter().filter_map(|group| match group.bound {
            Bound::AtLeast(bound) | Bound::AtMost(bound) => Some(bound),
            Bound::None => None,
        });
        let needed = bounds.fold(median, f64::max) * 1.12;
        most.clamp(needed, needed * 1.6)
    }

    fn draw(&self, svg: &mut String, y: f64) -> std::fmt::Result {
        let step = tick_step(self.top());
        let top = (self.top() / step).ceil() * step;
        let at = |value: f64| y + TITLE + PLOT * (1.0 - value.min(top) / top);
        writeln!(svg, r#"<text class="title" x="{LEFT}" y="{}">{}</text>"#, y + 24.0, escape(&self.title))?;
        self.legend(svg, y + 46.0)?;
        let middle = y + TITLE + PLOT / 2.0;
        writeln!(
            svg,
            r#"<text class="small" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{}</text>"#,
            escape(&self.axis)
        )?;
        for tick in 0..=(top / step).round() as u32 {
            let value = f64::from(tick) * step;
            let (line, right) = (at(value), WIDTH - RIGHT);
            writeln!(svg, r#"<line class="grid" x1="{LEFT}" x2="{right}" y1="{line:.1}" y2="{line:.1}"/>"#)?;
            let text = format!("{}", (value * 1000.0).round() / 1000.0);
            writeln!(
                svg,
                r#"<text class="small" x="{}" y="{:.1}" text-anchor="end">{text}</text>"#,
                LEFT - 8.0,
                line + 4.0
            )?;
        }
        let width = (WIDTH - LEFT - RIGHT) / self.groups.len() as f64;
        for (index, group) in self.groups.iter().enumerate() {
            self.draw_group(svg, group, LEFT + width * index as f64, width, &at)?;
            for (line, text) in group.label.lines().enumerate() {
                writeln!(
                    svg,
                    r#"<text class="small" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                    LEFT + width * (index as f64 + 0.5),
                    y + TITLE + PLOT + 17.0 + 15.0 * line as f64,
                    escape(text)
                )?;
            }
        }
        let one = at(1.0);
        writeln!(svg, r#"<line class="one" x1="{LEFT}" x2="{}" y1="{one:.1}" y2="{one:.1}"/>"#, WIDTH - RIGHT)
    }

    fn draw_group(
        &self,
        svg: &mut String,
        group: &Group,
        left: f64,
        width: f64,
        at: &impl Fn(f64) -> f64,
    ) -> std::fmt::Result {
        let slot = (width * 0.8 / self.series.len() as f64).min(60.0);
        let first = left + (width - slot * self.series.len() as f64) / 2.0;
        for (index, bar) in group.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let (x, colour) = (first + slot * index as f64, COLOURS[index % COLOURS.len()]);
            let (highest, foot) = (at(f64::INFINITY), at(0.0));
            let top = at(bar.median);
            let name = self.series.get(index).map_or("", String::as_str);
            writeln!(
                svg,
                r#"<rect x="{:.1}" y="{top:.1}" width="{:.1}" height="{:.1}" fill="{colour}"><title>{} {}: {bar}</title></rect>"#,
                x + 1.5,
                slot - 3.0,
                foot - top,
                escape(&group.label.replace('\n', " ")),
                escape(name),
            )?;
            let (middle, high, low) = (x + slot / 2.0, at(bar.most), at(bar.least));
            writeln!(
                svg,
                r#"<path class="whisker" d="M{middle:.1} {high:.1}V{low:.1}M{:.1} {high:.1}h8M{:.1} {low:.1}h8"/>"#,
                middle - 4.0,
                middle - 4.0
            )?;
            writeln!(
                svg,
                r#"<text class="value" x="{middle:.1}" y="{:.1}" text-anchor="middle">{}{}</text>"#,
                high.min(top) - 4.0,
                number(bar.median),
                // What is cut off at the end of the axis goes on beyond it.
                if high <= highest { " ↑" } else { "" }
            )?;
        }
        if let Bound::AtLeast(bound) | Bound::AtMost(bound) = group.bound {
            let (y, inset) = (at(bound), width * 0.04);
            writeln!(
                svg,
                r#"<line class="target" x1="{:.1}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"><title>target {}</title></line>"#,
                left + inset,
                left + width - inset,
                group.bound
            )?;
        }
        Ok(())
    }

    fn legend(&self, svg: &mut String, y: f64) -> std::fmt::Result {
        let mut x = LEFT;
        for (index, name) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            writeln!(svg, r#"<rect x="{x}" y="{}" width="12" height="12" fill="{colour}"/>"#, y - 10.0)?;
            writeln!(svg, r#"<text class="small" x="{}" y="{y}">{}</text>"#, x + 17.0, escape(name))?;
            x += 34.0 + 8.0 * name.chars().count() as f64;
        }
        writeln!(
            svg,
            r#"<line class="target" x1="{x}" x2="{}" y1="{}" y2="{}"/>"#,
            x + 26.0,
            y - 4.0,
            y - 4.0
        )?;
        writeln!(svg, r#"<text class="small" x="{}" y="{y}">target</text>"#, x + 32.0)?;
        x += 90.0;
        writeln!(
            svg,
            r#"<path class="whisker" d="M{} {}h22M{} {}v8M{} {}v8"/>"#,
            x,
            y - 4.0,
            x,
            y - 8.0,
            x + 22.0,
            y - 8.0
        )?;
        writeln!(
            svg,
            r#"<text class="small" x="{}" y="{y}">least and most of the rounds; the number is the median</text>"#,
            x + 30.0
        )
    }
}

/// All charts below each other, as an SVG.
pub fn draw(charts: &[Chart]) -> String {
    let height = CHART * charts.len() as f64 + 14.0;
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif">
<style>
.card {{ fill: #ffffff }} text {{ fill: #1f2328 }} .title {{ font-size: 16px; font-weight: 600 }} .small {{ font-size: 12px }}
.value {{ font-size: 10px }} .grid {{ stroke: #1f2328; stroke-opacity: 0.15 }} .one {{ stroke: #1f2328; stroke-opacity: 0.7 }}
.whisker {{ stroke: #1f2328; stroke-width: 1.3; fill: none }} .target {{ stroke: #d1242f; stroke-width: 2; stroke-dasharray: 6 3 }}
@media (prefers-color-scheme: dark) {{
.card {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} .grid, .one, .whisker {{ stroke: #e6edf3 }} .target {{ stroke: #ff7b72 }}
}}
</style>
<rect class="card" width="{WIDTH}" height="{height}" rx="8"/>
"#
    );
    for (index, chart) in charts.iter().enumerate() {
        // Writing to a string can't fail.
        let _ = chart.draw(&mut svg, CHART * index as f64);
    }
    svg.push_str("</svg>\n");
    svg
}

/// A round distance of ticks, of which four to ten reach to `top`.
fn tick_step(top: f64) -> f64 {
    let rough = (top / 8.0).max(1e-6);
    let power = 10f64.powf(rough.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    factors.into_iter().map(|factor| factor * power).find(|step| *step >= rough).unwrap_or(power * 10.0)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        let group = |median: f64| Group {
            label: "4K <read>\nd32".into(),
            bars: vec![Spread::of([median, median * 0.9, median * 1.1]), None],
            bound: Bound::AtLeast(2.0),
        };
        Chart::new("R&D", "ratio", vec!["raw".into(), "vhd".into()], vec![group(2.5), group(7.0)]).unwrap()
    }

    #[test]
    fn every_bar_and_target_is_within_the_card() {
        let svg = draw(&[chart(), chart()]);
        assert_eq!(svg.matches("<rect class=\"card\"").count(), 1);
        assert_eq!(svg.matches("<title>4K &lt;read&gt; d32 raw").count(), 4);
        let ys =
            svg.split(" y=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse::<f64>().unwrap());
        assert!(ys.clone().all(|y| (0.0..CHART * 2.0 + 14.0).contains(&y)), "{:?}", ys.collect::<Vec<_>>());
        assert!(svg.contains("R&amp;D") && !svg.contains("NaN"));
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (top, step) in [(7.7, 1.0), (1.0, 0.2), (0.9, 0.2), (23.0, 5.0), (110.0, 20.0)] {
            assert!((tick_step(top) - step).abs() < 1e-9, "{top}: {}", tick_step(top));
        }
    }

    #[test]
    fn nothing_to_draw_is_no_chart() {
        let group = Group { label: "x".into(), bars: vec![None], bound: Bound::None };
        assert!(Chart::new("t", "a", vec!["raw".into()], vec![group]).is_none());
    }
}
