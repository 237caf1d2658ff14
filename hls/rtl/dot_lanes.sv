// The arithmetic of evaluation alone: LANES token lanes, each with the multipliers of 4 bytes of keys, an adder
// tree and an INT32 accumulator. docs/evaluation.md gives the layout of a beat (16 lanes are one 64-byte beat).
//
// Every cycle with `valid` takes one beat and its slice of the query; `first` begins a tile and `last` ends it.
// STAGES cycles after `last`, `done` is high and `scores` holds the tile's scores. A tile may follow the one
// before it without a gap.
`default_nettype none

module dot_lanes #(
    parameter int KEY_BITS = 8,    // 8 or 4
    parameter int QUERY_BITS = 8,  // 8 or 16
    parameter int LANES = 16
) (
    input  wire logic                                      clk,
    input  wire logic                                      reset,
    input  wire logic                                      valid,
    input  wire logic                                      first,
    input  wire logic                                      last,
    input  wire logic [LANES*32-1:0]                       beat,
    input  wire logic [(32/KEY_BITS)*QUERY_BITS-1:0]       query,
    output logic                                           done,
    output logic      [LANES*32-1:0]                       scores
);
  localparam int STEP = 32 / KEY_BITS;                  // dimensions of a beat: 4 or 8
  localparam int LEVELS = $clog2(STEP);                 // of the adder tree
  localparam int PRODUCT_BITS = KEY_BITS + QUERY_BITS;  // unsigned times signed: no bit more
  localparam int TREE_BITS = PRODUCT_BITS + LEVELS;
  localparam int STAGES = 1 + LEVELS + 1;               // products, tree, accumulator

  // first and last travel beside the data.
  logic [STAGES-1:0] valids, firsts, lasts;
  always_ff @(posedge clk) begin
    if (reset) valids <= '0;
    else valids <= {valids[STAGES-2:0], valid};
    firsts <= {firsts[STAGES-2:0], first};
    lasts  <= {lasts[STAGES-2:0], last};
  end
  assign done = valids[STAGES-1] & lasts[STAGES-1];

  genvar lane, i, level;
  generate
    for (lane = 0; lane < LANES; lane++) begin : g_lane
      // tree[0] are the products; each level has half as many sums as the one before, from place 0 on.
      logic signed [TREE_BITS-1:0] tree[(LEVELS+1)*STEP];

      for (i = 0; i < STEP; i++) begin : g_product
        localparam int AT = 32 * lane + (KEY_BITS == 8 ? 8 * i : 8 * (i % 4) + 4 * (i / 4));
        wire signed [KEY_BITS:0] key = {1'b0, beat[AT+:KEY_BITS]};
        wire signed [QUERY_BITS-1:0] element = query[QUERY_BITS*i+:QUERY_BITS];
        always_ff @(posedge clk) tree[i] <= key * element;
      end

      for (level = 1; level <= LEVELS; level++) begin : g_level
        for (i = 0; i < (STEP >> level); i++) begin : g_sum
          always_ff @(posedge clk)
            tree[level*STEP+i] <= tree[(level-1)*STEP+2*i] + tree[(level-1)*STEP+2*i+1];
        end
      end

      logic signed [31:0] score;
      wire signed [31:0] dot = tree[LEVELS*STEP];
      always_ff @(posedge clk)
        if (valids[STAGES-2]) score <= firsts[STAGES-2] ? dot : score + dot;
      assign scores[32*lane+:32] = score;
    end
  endgenerate
endmodule

`default_nettype wire
